"""The exit code of a result."""

from __future__ import annotations

from megabase.pipeline.bench.contest import Point, Reason
from megabase.pipeline.bench.result import Result


def test_the_exit_code_is_1_only_if_a_contestant_of_megabase_failed():
    result = Result("attention", {}, {})
    result.add("length", [Point("transformers", 8, left_out=Reason("failed: x", failed=True))])
    assert result.exit_code() == 0
    result.add("length", [Point("ours", 8, left_out=Reason("failed: x", failed=True))])
    assert result.exit_code() == 1
