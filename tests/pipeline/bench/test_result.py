"""The exit code of a result."""

from __future__ import annotations

from megabase.pipeline.bench.contest import Point, Reason
from megabase.pipeline.bench.result import Result


def test_one_of_ours_that_fails_is_a_failure():
    result = Result("attention", {}, {})
    result.add("length", [Point("transformers", 8, left_out=Reason("failed: x", failed=True))])
    assert result.exit_code() == 0
    result.add("length", [Point("ours", 8, left_out=Reason("failed: x", failed=True))])
    assert result.exit_code() == 1
