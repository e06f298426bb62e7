"""The status of a run: `status.json` for people, and a file that `slurm/train.sbatch` reads."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from megabase.datamodules.files import publish_json
from megabase.pipeline.files import read_object
from megabase.pipeline.rundir.paths import RunPaths

logger = logging.getLogger(__name__)

RUNNING, FINISHED = "running", "finished"
"""States of a run; `training/outcome.py` has the others."""

# In this environment variable the job script passes the path of the file to which it wants the status written.
STATUS_FILE_VARIABLE = "MEGABASE_STATUS_FILE"
# Beside that file, the node of a rank that failed with an unexpected error.
RANK_FAILURES = "failed-{rank}.json"


def write_status(directory: Path, state: str, step: int | None) -> None:
    """Write the state of a run and its step to `status.json`. For rank 0 only.

    After a run was killed, the file still says "running". An OSError is logged, not raised.
    """
    _write(RunPaths(directory).status, {"state": state, "step": step})


def write_launcher_status(state: str, step: int | None, directory: Path | None = None) -> None:
    """Write the state and step to the file that MEGABASE_STATUS_FILE names, if it is set. For rank 0 only.

    Args:
        state: a state as in `status.json`.
        step: the step, if it is known.
        directory: the run directory, if this start may have written checkpoints there.
    """
    if not (file := os.environ.get(STATUS_FILE_VARIABLE)):
        return
    status: dict[str, Any] = {"state": state, "step": step}
    if directory:
        status["checkpoints"] = str(RunPaths(directory).checkpoints)
    _write(Path(file), status)


def write_rank_failure(rank: str | None, node: str) -> None:
    """Write for the job script, if there is one, that this rank failed by itself, and on which node."""
    if file := os.environ.get(STATUS_FILE_VARIABLE):
        _write(Path(file).with_name(RANK_FAILURES.format(rank=rank)), {"node": node})


def read_status(directory: Path) -> tuple[str, int | None]:
    """The state and the step in `status.json`; ("", None) if there is none or it cannot be read."""
    status = read_object(RunPaths(directory).status)
    return (str(status["state"]), status["step"]) if {"state", "step"} <= status.keys() else ("", None)


def _write(path: Path, status: dict[str, Any]) -> None:
    try:
        publish_json(path, status)
    except OSError as error:
        logger.error(f"cannot write {path}: {error}")
