"""Ranks that fail: one line says why, whoever it is that knows."""

import platform

import pytest

from tests.pipeline.processes import run_ranks
from tests.pipeline.ranks import complaining_worker

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize(
    ("who", "line"),
    [
        ("all", "megabase: the disk of all is away"),
        ("1", f"megabase: rank 1 on {platform.node()}: the disk of 1 is away"),
    ],
)
def test_why_ranks_fail_is_said_once(who: str, line: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_ranks(2, complaining_worker.main, who) == 2
    said = capfd.readouterr().err.splitlines()
    assert [text for text in said if text.startswith("megabase")][:1] == [line]
    assert sum("is away" in text for text in said) == 1
