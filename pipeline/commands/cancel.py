"""`megabase cancel RUN`: stop a run at a checkpoint, and keep it stopped. Needs no torch."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "stop a run at a checkpoint, with all its jobs"
DESCRIPTION = (
    "Ask a run to write a checkpoint and to end, and cancel its jobs that wait in SLURM's queue. A STOP file in the run"
    " directory asks it, so it works for every run, in a job or not, from any machine that sees the directory; the run"
    " does not start again while that file exists."
)


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.description = DESCRIPTION
    parser.add_argument("directory", metavar="RUN", help="run directory: <run.root>/<run.name>")
    parser.add_argument(
        "--now", action="store_true", help="cancel jobs that run as well: no checkpoint is waited for"
    )


def run(options: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    from megabase.pipeline.slurm.cancel import cancel_run

    for line in cancel_run(Path(options.directory), now=options.now):
        print(line)
    return 0
