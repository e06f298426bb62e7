"""Ranks that fail: one line says why, whichever rank knows."""

import platform

import pytest

from tests.pipeline.processes import run_ranks
from tests.pipeline.ranks import failing_worker

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize(
    ("failing", "line"),
    [
        ("all", "megabase: the disk of all is away"),
        ("1", f"megabase: rank 1 on {platform.node()}: the disk of 1 is away"),
    ],
)
def test_an_error_is_reported_once(failing: str, line: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_ranks(2, failing_worker.main, failing) == 2
    lines = capfd.readouterr().err.splitlines()
    assert [text for text in lines if text.startswith("megabase")][:1] == [line]
    assert sum("is away" in text for text in lines) == 1
