"""What MLflow calls the state of a run."""

import pytest

from megabase.pipeline.tracking.status import mlflow_status


@pytest.mark.parametrize(
    ("state", "alone", "in_job"),
    [
        ("running", "RUNNING", "RUNNING"),
        ("finished", "FINISHED", "FINISHED"),
        ("failed", "FAILED", "FAILED"),
        ("stopped", "KILLED", "KILLED"),
        ("again", "KILLED", "RUNNING"),
        ("crashed", "FAILED", "RUNNING"),
        ("", "RUNNING", "RUNNING"),
    ],
)
def test_a_run_that_a_job_script_may_start_again_is_running(state: str, alone: str, in_job: str) -> None:
    assert mlflow_status(state, may_continue=False) == alone
    assert mlflow_status(state, may_continue=True) == in_job
