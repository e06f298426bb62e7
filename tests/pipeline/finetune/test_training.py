"""`megabase finetune` on two real ranks: stopped and repeated, it gives the bytes of a run that was not stopped."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import training_rows
from tests.processes import Job

pytestmark = [pytest.mark.slow, pytest.mark.distributed]


def test_a_run_that_was_stopped_goes_on(
    exported: Path, table: Path, tmp_path: Path, start_job: Callable[..., Job]
) -> None:
    settings = ["trainer.devices=2", "zero.stage=3", "tracking.enabled=false", "trainer.max_steps=16"]

    def call(name: str, *more: str) -> tuple[int, str]:
        arguments = [exported, table, "-o", tmp_path / name, "--mode", "lora", *settings, *more]
        return start_job("finetune", *map(str, arguments)).wait()

    code, output = call("whole")
    assert code == 0, output
    # At its limit a start finishes its step, and the ranks agree on where to stop.
    assert call("stopped", "trainer.max_minutes=0.00001")[0] == 75
    assert 0 < len(training_rows(tmp_path / "stopped")) < 16
    code, output = call("stopped")
    assert code == 0, output
    for file in ("metrics.jsonl", "predictions.parquet"):
        assert (tmp_path / "stopped" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file
    assert "accuracy" in output
