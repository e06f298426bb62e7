"""`megabase status [RUN...]`: how runs stand, in SLURM and in their directories. It only reads, and needs no torch."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

HELP = "how runs stand: SLURM's job, step, speed, checkpoint, ranks that hang"
DESCRIPTION = (
    "Show a table of runs: what SLURM says of their jobs, what their journals, checkpoints and heartbeats say, and"
    " which rank on which node hangs. It changes nothing."
)
# `run.root`, if the config does not set it.
ROOT = "runs"
# Seconds between two looks with --watch. Each asks the SLURM controller once.
INTERVAL_S = 10.0


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.description = DESCRIPTION
    parser.add_argument(
        "directories",
        nargs="*",
        metavar="RUN",
        help=f"run directories, or directories of runs (default: all runs in {ROOT}/)",
    )
    parser.add_argument("--json", action="store_true", help="as JSON, a list with an object for each run")
    parser.add_argument(
        "--watch", action="store_true", help=f"show it anew every {INTERVAL_S:.0f} s, until Ctrl-C"
    )


def run(options: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    from megabase.pipeline.errors import UserError

    directories = [Path(each) for each in options.directories or [ROOT]]
    if not options.directories and not directories[0].is_dir():
        raise UserError(f"no directory {ROOT}/ here: name run directories, or the run.root that holds them")
    try:
        if not options.watch:
            _print(directories, as_json=options.json)
        elif sys.stdout.isatty() and not options.json and os.environ.get("TERM") != "dumb":
            _draw(directories)
        else:
            while True:
                _print(directories, as_json=options.json)
                if not options.json:
                    print()
                sys.stdout.flush()
                time.sleep(INTERVAL_S)
    except KeyboardInterrupt:
        if not options.watch:
            raise
    except BrokenPipeError:  # as in `megabase status --watch | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _print(directories: Sequence[Path], *, as_json: bool) -> None:
    from megabase.pipeline.rundir.view import find_runs
    from megabase.pipeline.slurm import status, status_table
    from megabase.pipeline.tables import show

    reports, problem = status.report(find_runs(directories))
    if as_json:
        print(status_table.as_json(reports))
    else:
        show(status_table.as_table(reports), *status_table.details(reports))
    if problem:
        print(f"megabase: without SLURM's jobs: {problem}", file=sys.stderr)


def _draw(directories: Sequence[Path]) -> None:
    """Redraw the table on the terminal, until Ctrl-C."""
    from rich.console import Console, Group
    from rich.live import Live

    from megabase.pipeline.rundir.view import find_runs
    from megabase.pipeline.slurm import status, status_table

    console = Console(markup=False, highlight=False)
    find_runs(directories)  # an error is reported without a drawing above it
    with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
        console.show_cursor(True)  # a process that is killed could not show it again
        while True:
            reports, problem = status.report(find_runs(directories))
            notes = status_table.details(reports) + ([f"without SLURM's jobs: {problem}"] if problem else [])
            when = time.strftime("%H:%M:%S", time.localtime())
            live.update(Group(status_table.as_table(reports), *notes, f"{when}; Ctrl-C ends"), refresh=True)
            time.sleep(INTERVAL_S)
