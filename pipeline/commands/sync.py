"""`megabase sync RUN`: send the journal of a run to MLflow, from a machine that reaches the server."""

from __future__ import annotations

import argparse
import logging
import time
from pathlib import Path

from megabase.pipeline.errors import UserError

HELP = "send a run to MLflow"
DESCRIPTION = (
    "Send what MLflow lacks of a run: points, settings, files and status. It may run beside a job that trains, for"
    " example on a login node if the compute nodes do not reach the server. Sent twice, nothing arrives twice."
)
SECTION = "tracking."
# Seconds between two looks whether another process has made the model.
POLL_S = 2.0

logger = logging.getLogger(__name__)


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.description = DESCRIPTION
    parser.add_argument("directory", metavar="RUN", help="run directory; it may be training")
    parser.add_argument(
        "settings",
        nargs="*",
        metavar="tracking.KEY=VALUE",
        help="another server or experiment than the run's own; log_model=true, register=NAME: with its model",
    )
    parser.add_argument("--follow", action="store_true", help="go on until the run has ended")


def run(options: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    from megabase.pipeline.rundir.view import check_run_directory
    from megabase.pipeline.tracking.sync import Sync

    for setting in options.settings:
        if not setting.startswith(SECTION) or "=" not in setting:
            raise UserError(f"{setting}: give settings as tracking.KEY=VALUE")
    directory = Path(options.directory)
    check_run_directory(directory)
    sync = Sync(directory, options.settings)
    if options.follow:
        logger.info(
            f"{directory}: sending to MLflow at {sync.server.uri} until the run has ended (Ctrl-C ends this)"
        )
        sync.follow()
    if sync.wants_model:
        _make_model(directory)
    sync.once()
    print(f"{sync.sender.sent} new points; {sync.address()}")
    return 0


def _make_model(directory: Path) -> None:
    """Make the model of a run that is finished, unless the run itself has."""
    from megabase.pipeline.rundir.status import FINISHED, read_status

    if read_status(directory)[0] != FINISHED:
        logger.warning(f"{directory}: the run is not finished, so MLflow does not get its model yet")
        return
    from megabase.datamodules.files import LockHeldError
    from megabase.pipeline.inference.mlflow_model import write_model

    while True:
        try:
            logger.info(f"MLflow model: {write_model(directory)}")
            return
        except LockHeldError:  # by the run itself, which has just finished
            time.sleep(POLL_S)
