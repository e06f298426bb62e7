"""What MLflow is told about a run when no SLURM job continues it."""

from __future__ import annotations

from pathlib import Path

from megabase.datamodules.files import FileLock, LockHeldError
from megabase.pipeline.files import read_object
from megabase.pipeline.rundir.paths import RunPaths
from megabase.pipeline.tracking.last_word import say_last_word
from megabase.pipeline.tracking.status import FAILED, FINISHED, KILLED

# The states that a start writes once it has the run directory for itself.
_TRAINED = ("running", "again", "crashed", "finished", "stopped")


def last_status(state: str, job_state: str, reason: str) -> str:
    """The final status of a run in MLflow.

    Args:
        state: that the last start wrote, as in status.json.
        job_state, reason: JobState and Reason of `scontrol show job`.
    """
    if state == "finished":
        return FINISHED
    if state == "failed":
        return FAILED
    # A preemption does not get here: SLURM or the next job of a chain continues after it.
    was_cancelled = job_state not in ("RUNNING", "") and reason != "TimeLimit"
    return KILLED if was_cancelled or state in ("again", "stopped") else FAILED


def report_end(status: Path, checkpoints: str, job_state: str, reason: str) -> None:
    """Tell MLflow how a run ended that no job continues. Takes seconds at most, and never raises.

    Args:
        status: the status file of the last start; need not exist.
        checkpoints: directory of the run's checkpoints, if the record of the job has it.
        job_state, reason: see `last_status`.
    """
    left = read_object(status)
    state = str(left.get("state", ""))
    checkpoints = str(left.get("checkpoints") or checkpoints)
    if not checkpoints:
        return
    directory = Path(checkpoints).parent
    if state not in _TRAINED and _is_locked(directory):
        return  # another job trains this run, and that is why this one ended
    say_last_word(directory, last_status(state, job_state, reason))


def _is_locked(directory: Path) -> bool:
    try:
        FileLock.take(RunPaths(directory).lock).close()
    except LockHeldError:
        return True
    except OSError:
        pass
    return False
