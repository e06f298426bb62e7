"""What MLflow is told when a SLURM job does not start again."""

import json
from pathlib import Path

import pytest

from megabase.datamodules.files import FileLock
from megabase.pipeline.rundir.paths import RunPaths
from megabase.pipeline.slurm import last_status as module
from megabase.pipeline.slurm.last_status import last_status, report_end


@pytest.mark.parametrize(
    ("state", "job_state", "reason", "status"),
    [
        ("finished", "CANCELLED", "None", "FINISHED"),
        ("failed", "RUNNING", "None", "FAILED"),
        ("running", "RUNNING", "None", "FAILED"),  # SIGKILL
        ("crashed", "RUNNING", "None", "FAILED"),
        ("", "RUNNING", "None", "FAILED"),
        ("again", "RUNNING", "None", "KILLED"),
        ("stopped", "RUNNING", "None", "KILLED"),
        ("running", "CANCELLED", "None", "KILLED"),
        ("running", "", "", "FAILED"),  # the controller did not answer
        ("crashed", "TIMEOUT", "TimeLimit", "FAILED"),
    ],
)
def test_every_end(state: str, job_state: str, reason: str, status: str) -> None:
    assert last_status(state, job_state, reason) == status


def test_a_job_that_never_had_the_run_says_nothing_while_another_trains_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[tuple[Path, str]] = []
    monkeypatch.setattr(module, "say_last_word", lambda directory, status: said.append((directory, status)))
    run = RunPaths(tmp_path / "r")
    run.checkpoints.mkdir(parents=True)
    status = tmp_path / "status.json"
    report_end(status, "", "RUNNING", "None")  # nothing is known of the run
    assert not said
    for state, expected in (("starting", []), ("running", [(run.directory, "FAILED")])):
        status.write_text(json.dumps({"state": state, "checkpoints": str(run.checkpoints)}))
        with FileLock.take(run.lock):
            report_end(status, "", "RUNNING", "None")
        assert said == expected, state
    status.unlink()
    report_end(status, str(run.checkpoints), "RUNNING", "None")
    assert said == [(run.directory, "FAILED")] * 2
