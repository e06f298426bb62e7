"""How a start of a run ends, and where that is written: the status files first, then stderr, then MLflow."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megabase.datamodules.errors import DataError
from megabase.models.config import ConfigError
from megabase.pipeline.config.schema import TrackingConfig
from megabase.pipeline.errors import RunError, UserError, first_line
from megabase.pipeline.ranks import supervisor, watchdog
from megabase.pipeline.ranks.failure import report_failure
from megabase.pipeline.report.page import write_report
from megabase.pipeline.rundir.status import FINISHED, RUNNING, write_launcher_status, write_status
from megabase.pipeline.tracking.mirror import Mirror
from megabase.pipeline.tracking.status import has_job_script, mlflow_status

logger = logging.getLogger(__name__)

# Seconds that the end of a run waits for MLflow. What is not sent by then stays in the journal for the next start.
MLFLOW_FLUSH_S = 20.0
# The same when the run fails: the launcher kills rank 0 GRACE_S seconds after another rank exits.
MLFLOW_FLUSH_AFTER_FAILURE_S = supervisor.GRACE_S / 2


@dataclass
class Outcome:
    """How a start of a run ends.

    Attributes:
        state: as in status.json. again: stopped at a checkpoint, to be started again. stopped: the same, but by a STOP
            file, so the job script does not start it again. failed: another start would fail in the same way. crashed:
            another start may succeed. Or "finished".
        step: the last optimizer step that was done.
        started: whether this start has written in the run directory. If not, the status of the start before stays.
    """

    state: str = "crashed"
    step: int = 0
    started: bool = False


def state_of(error: BaseException) -> str:
    """The state of a run that an error ended: failed or crashed."""
    if not isinstance(error, RunError | UserError | DataError | ConfigError):
        return "crashed"
    return "crashed" if getattr(error, "temporary", False) else "failed"


def write_running(directory: Path, step: int) -> None:
    """Write that the run trains, for people and for the job script. For rank 0."""
    write_status(directory, RUNNING, step)
    write_launcher_status(RUNNING, step, directory)


def conclude(
    outcome: Outcome,
    directory: Path,
    rank: int,
    mirror: Mirror | None,
    failure: BaseException | None,
    *,
    tracking: TrackingConfig | None = None,
) -> None:
    """Write the status, print the error, write report and model, flush MLflow; every rank calls it.

    In this order: SLURM or the launcher may kill this process while MLflow is being flushed.

    Args:
        outcome: of this start.
        directory: the run directory.
        rank: of this process.
        mirror: of rank 0, if the run is tracked.
        failure: the error that ended the run, if one did.
        tracking: what to write if the run is finished; None: nothing.
    """
    if rank == 0:
        if outcome.started:
            write_status(directory, outcome.state, outcome.step)
        write_launcher_status(outcome.state, outcome.step, directory)
    if failure:
        report_failure(failure)
    if tracking and rank == 0 and outcome.started and outcome.state == FINISHED:
        if tracking.report:
            _make("report", write_report, directory)
        if tracking.wants_model:
            watchdog.beat("writing the MLflow model")
            _make("MLflow model", _write_model, directory)
    if mirror:
        seconds = MLFLOW_FLUSH_AFTER_FAILURE_S if failure else MLFLOW_FLUSH_S
        status = mlflow_status(outcome.state, may_continue=has_job_script())
        if not mirror.finish(status, seconds):
            logger.warning(
                "MLflow has not received everything: the journal has the rest, and the same command sends it"
            )


def _write_model(directory: Path) -> Path:
    # Imported here, because it imports DeepSpeed, and the process that starts ranks does not need it.
    from megabase.pipeline.inference.mlflow_model import write_model

    return write_model(directory)


def _make(what: str, make: Callable[[Path], Path], directory: Path) -> None:
    try:
        logger.info(f"{what}: {make(directory)}")
    except Exception as error:  # which must not fail a run that is finished
        logger.warning(f"the {what} cannot be written: {first_line(error)}")
