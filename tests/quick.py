"""Which cases of a parametrized test `make quick` runs: some of them. `make test` runs all."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def every(n: int, cases: Iterable[Any]) -> list[Any]:
    """Values for `pytest.mark.parametrize`: the first, and every n-th after it; the others are marked slow."""
    return [case if number % n == 0 else slow(case) for number, case in enumerate(cases)]


def slow(case: Any) -> Any:
    """A value (or a tuple of values) for `pytest.mark.parametrize` that is marked slow."""
    values = case if isinstance(case, tuple) else (case,)
    return pytest.param(*values, marks=pytest.mark.slow)
