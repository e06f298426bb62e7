"""A run whose ranks fail reports the error once, from all ranks or from one."""

import platform

import pytest

from tests.pipeline.ranks import failing_worker
from tests.processes import run_ranks

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize(
    ("failing", "line"),
    [
        ("all", "megabase: the disk of all is away"),
        ("1", f"megabase: rank 1 on {platform.node()}: the disk of 1 is away"),
    ],
)
def test_an_error_is_reported_once(failing: str, line: str) -> None:
    code, messages = run_ranks(2, failing_worker.main, failing)
    assert code == 2, messages
    lines = messages.splitlines()
    assert [text for text in lines if text.startswith("megabase")][:1] == [line]
    assert sum("is away" in text for text in lines) == 1
