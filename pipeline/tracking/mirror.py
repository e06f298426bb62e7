"""A thread that copies the journal of a run to MLflow while it trains.

Training writes the journal and never calls MLflow. This thread reads the journal and sends new rows. If the server is
slow or down, it tries again after growing pauses and delays nothing else; once the server answers, it sends all rows
that are missing.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from pathlib import Path

from megabase.datamodules.files import LockHeldError
from megabase.pipeline.config.schema import RunConfig
from megabase.pipeline.errors import first_line
from megabase.pipeline.files import read_object
from megabase.pipeline.rundir.paths import RunPaths
from megabase.pipeline.tracking.sender import Sender
from megabase.pipeline.tracking.server import Server
from megabase.pipeline.tracking.status import FINISHED

logger = logging.getLogger(__name__)

POLL_S = 1.0
LONGEST_PAUSE_S = 60.0
# Most characters of a server's error in a warning.
ERROR_LENGTH = 160


def is_complete(config: RunConfig) -> bool:
    """Whether MLflow has everything of a finished run, according to `mlflow.json`. MLflow is not asked."""
    server = Server.of(config)
    about = {"uri": server.uri, "experiment": server.experiment, "status": FINISHED}
    return server.has_database() and about.items() <= read_object(RunPaths(config.directory).mlflow).items()


class Mirror:
    """Sends the journal of a run directory to one MLflow run. For rank 0.

    Args:
        config: of the run.
        directory: the run directory.

    Raises:
        UserError: MLFLOW_TRACKING_URI holds a password.
    """

    def __init__(self, config: RunConfig, directory: Path) -> None:
        self._server = Server.of(config)
        self._sender = Sender(config, directory, self._server)
        self._finish = threading.Event()
        self._status: str | None = None
        self._failing = False
        self._thread = threading.Thread(target=self._work, name="mlflow-mirror", daemon=True)

    def start(self) -> Mirror:
        """Start the thread."""
        self._thread.start()
        return self

    def finish(self, status: str, timeout_s: float) -> bool:
        """Send the rest and set the run's status (RUNNING if a job script may start it again).

        Returns:
            Whether everything was sent within `timeout_s`. The journal has the rest, and the next start of the run
            sends it.
        """
        self._status = status
        self._finish.set()
        if self._thread.ident is None:
            return True  # training ended before the journal was opened, so there is nothing to send
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _work(self) -> None:
        pause = POLL_S
        while True:
            finishing = self._finish.is_set()
            try:
                self._sender.send(self._status if finishing else None, complete=finishing)
                self._report_recovery()
                pause = POLL_S
                if finishing:
                    return
            except LockHeldError:  # by `megabase sync`, which sends the same
                pause = POLL_S
            except Exception as error:  # of MLflow, SQLAlchemy, requests or sqlite: none may end a training
                self._report(error)
                pause = min(pause * 2, LONGEST_PAUSE_S)
            self._finish.wait(pause)
            if finishing:
                time.sleep(POLL_S)

    def _report(self, error: Exception) -> None:
        if not self._failing:
            logger.warning(
                f"MLflow at {self._server.uri} does not take metrics ({describe(error)});"
                " training goes on, the journal keeps them (to train without MLflow: tracking.enabled=false)"
            )
        self._failing = True

    def _report_recovery(self) -> None:
        if self._failing:
            logger.info(f"MLflow at {self._server.uri} takes metrics again, and has what it missed")
        self._failing = False


def describe(error: Exception) -> str:
    """An error of MLflow in one line: its class, and what the server answered if it did."""
    text = first_line(error)
    name = type(error).__name__
    if answered := re.search(r"too many (\d+) error responses", text):
        return f"it answers with error {answered[1]}: see the server's own log"
    if "timeout exception" in text:
        return "no answer in time, see MLFLOW_HTTP_REQUEST_TIMEOUT"
    # MLflow's other texts on failed requests repeat the address, and are long.
    return name if "failed with" in text else f"{name}: {text[:ERROR_LENGTH]}"
