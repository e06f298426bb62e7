"""`megabase sync`: send a run directory to MLflow from a machine that reaches the server, beside a running job."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megabase.datamodules.files import LockHeldError
from megabase.pipeline.config.load import load
from megabase.pipeline.errors import RunError
from megabase.pipeline.files import read_object
from megabase.pipeline.rundir.paths import RunPaths
from megabase.pipeline.rundir.status import read_status
from megabase.pipeline.tracking.mirror import describe
from megabase.pipeline.tracking.sender import Sender
from megabase.pipeline.tracking.server import Server
from megabase.pipeline.tracking.status import FINAL, RUNNING, mlflow_status

logger = logging.getLogger(__name__)

# Seconds to wait for another process that sends the same run.
LOCK_WAIT_S = 120.0
POLL_S = 2.0
# What a link to a run needs so that MLflow opens its page of model training, not that of GenAI apps.
PAGE = "?workflowType=machine_learning"


class Sync:
    """Sends the journal of a run directory.

    Args:
        directory: the run directory.
        settings: "tracking.KEY=VALUE" that replace those of the run.

    Raises:
        UserError: the settings of the run cannot be read, or its URI holds a password.

    Attributes:
        server: to send to.
        sender: that sends.
        tracked: whether the run itself sends its journal (`tracking.enabled`).
        wants_model: whether MLflow gets the trained model.
    """

    def __init__(self, directory: Path, settings: Sequence[str] = ()) -> None:
        directory = directory.absolute()
        config = load([RunPaths(directory).config], settings)
        # The directory may be a copy, and its config may name it relative to another directory.
        config.run.root = str(directory.parent)
        known = read_object(RunPaths(directory).mlflow)
        self._directory = directory
        self.server = Server.of(config, known=known)
        self.sender = Sender(config, directory, self.server)
        self.tracked = config.tracking.enabled
        self.wants_model = config.tracking.wants_model

    def once(self) -> str:
        """Send everything there is; returns the status that the run has now in MLflow.

        Raises:
            RunError: the server does not take it, or another process keeps on sending the run.
        """
        deadline = time.monotonic() + LOCK_WAIT_S
        while True:
            status = self._status()
            try:
                self.sender.send(status, complete=status in FINAL)
                return status
            except LockHeldError as error:
                if time.monotonic() > deadline:
                    raise RunError(
                        f"{self._directory} is being sent by {error.holder}: wait for it"
                    ) from None
                time.sleep(POLL_S)
            except Exception as error:
                raise RunError(
                    f"MLflow at {self.server.uri} does not take the run ({describe(error)}): nothing is lost, the same"
                    " command sends the rest"
                ) from error

    def follow(self) -> None:
        """Send what is new until the run has ended. While the server is away, it is tried again."""
        failing = False
        while True:
            try:
                if self.once() in FINAL:
                    return
                failing = False
            except RunError as error:
                if not failing:
                    logger.warning(f"{error}; trying again")
                failing = True
            time.sleep(POLL_S)

    def address(self) -> str:
        """Where MLflow shows the run: a link, or the command that starts a page for a database."""
        known = self.sender.identity.read()
        page = f"/#/experiments/{known.get('experiment_id')}/runs/{known.get('run_id')}{PAGE}"
        if self.server.uri.startswith(("http://", "https://")):
            return self.server.uri.rstrip("/") + page
        return f"http://127.0.0.1:5000{page} after: mlflow server --backend-store-uri {self.server.uri}"

    def _status(self) -> str:
        """The run's status in MLflow's words; RUNNING if the job may start it again."""
        known: dict[str, Any] = self.sender.identity.read()
        if word := known.get("last_word"):
            return str(word)
        state, _ = read_status(self._directory)
        return mlflow_status(state, may_continue=RunPaths(self._directory).job.exists()) or RUNNING
