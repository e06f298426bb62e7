"""The last word about a run that ended without saying it: by SIGKILL, or after its last restart."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path

from megabase.pipeline.files import read_object
from megabase.pipeline.rundir.paths import RunPaths
from megabase.pipeline.tracking.status import FINAL

logger = logging.getLogger(__name__)

TIMEOUT_S = 20.0
_PAUSE_S = 1.0


def say_last_word(directory: Path, status: str, timeout_s: float = TIMEOUT_S) -> bool:
    """Send the rest of a run's journal to MLflow and set its final status, if it has none. Never raises.

    The status is written to `mlflow.json` first, so that a later `megabase sync` sends it if MLflow is away now. A run
    that has never started, or is not tracked, is left alone. Call it only if nothing trains in the directory.

    Args:
        directory: the run directory.
        status: FINISHED, FAILED or KILLED.
        timeout_s: to return after, whatever MLflow does.

    Returns:
        Whether MLflow has the status, or need not get it.
    """
    known = read_object(RunPaths(directory).mlflow)
    if not known.get("key") or known.get("status") in FINAL:
        return True
    said: list[bool] = []
    thread = threading.Thread(
        target=lambda: said.append(_say(directory, status, time.monotonic() + timeout_s)),
        name="mlflow-last-word",
        daemon=True,
    )
    thread.start()
    thread.join(timeout_s)
    if said != [True]:
        logger.warning(
            f"MLflow has not received that the run is {status}: megabase sync {directory} sends it"
        )
    return said == [True]


def _say(directory: Path, status: str, deadline: float) -> bool:
    from megabase.pipeline.tracking.sync import Sync

    error: Exception | None = None
    while True:
        try:
            sync = Sync(directory)
            sync.sender.identity.update(last_word=status)
            if sync.tracked:
                sync.sender.send(status, complete=True)
            return True
        except Exception as caught:  # whatever it is, the caller's own work is done and must not fail
            error = caught
        if time.monotonic() + _PAUSE_S > deadline:
            logger.debug(f"{directory}: {error}")
            return False
        time.sleep(_PAUSE_S)
