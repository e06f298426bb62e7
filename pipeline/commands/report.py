"""`megabase report RUN`: a run as one HTML page."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "a run as a page: figures, pictures, settings"


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.description = (
        "Write report.html into the run directory: what was trained and how well, with pictures and the settings that"
        " are not defaults. The file holds everything, so it can be sent. A run may be training; training writes the"
        " page itself when it ends."
    )
    parser.add_argument("directory", metavar="RUN", help="run directory: <run.root>/<run.name>")


def run(options: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    from megabase.pipeline.errors import UserError
    from megabase.pipeline.report.page import write_report

    try:
        print(write_report(Path(options.directory)))
    except OSError as error:
        raise UserError(
            f"{error.filename or options.directory} cannot be written: {error.strerror}"
        ) from None
    return 0
