"""What MLflow calls the state of a run."""

from __future__ import annotations

import os

from megabase.pipeline.rundir.status import STATUS_FILE_VARIABLE

RUNNING = "RUNNING"
FINISHED = "FINISHED"
FAILED = "FAILED"
KILLED = "KILLED"
FINAL = (FINISHED, FAILED, KILLED)

# By the states in status.json, which training/outcome.py explains.
OF_STATE = {
    "running": RUNNING,
    "finished": FINISHED,
    "again": KILLED,
    "stopped": KILLED,
    "failed": FAILED,
    "crashed": FAILED,
}
# After these the job script may start the run again.
_MAY_CONTINUE = ("again", "crashed")


def has_job_script() -> bool:
    """Whether a job script started this process. It says the last word when it does not start the run again."""
    return STATUS_FILE_VARIABLE in os.environ


def mlflow_status(state: str, *, may_continue: bool) -> str:
    """The status of a run in MLflow.

    Args:
        state: in status.json; "" if there is none.
        may_continue: a job script decides whether a run that stopped or crashed starts again.
    """
    if may_continue and state in _MAY_CONTINUE:
        return RUNNING
    return OF_STATE.get(state, RUNNING)
