"""`megabase watch RUN`: follow a run from another shell. It only reads the run directory, and needs no torch."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megabase.pipeline.rundir.view import RunView

HELP = "follow a run that trains"
DESCRIPTION = (
    "Show step, loss, speed, validation and checkpoints of a run, and follow it until it is finished or you press"
    " Ctrl-C. It only reads the run directory, so it works from any machine that sees it, whatever the run does."
)
# Seconds between two looks at the run directory.
POLL_S = 1.0


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.description = DESCRIPTION
    parser.add_argument("directory", metavar="RUN", help="run directory: <run.root>/<run.name>")
    parser.add_argument("--once", action="store_true", help="print the state of the run and end")


def run(options: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    from megabase.pipeline.rundir.view import RunView

    view = RunView(Path(options.directory))
    try:
        if options.once:
            _print_once(view)
        elif sys.stdout.isatty() and os.environ.get("TERM") != "dumb":
            _draw(view)
        else:
            _print_lines(view)
    except KeyboardInterrupt:  # the usual end
        pass
    except BrokenPipeError:  # as in `megabase watch RUN | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _print_once(view: RunView) -> None:
    from megabase.pipeline.rundir.figures import fields

    view.read()
    now = time.time()
    print(view.name)
    for name, value in (*fields(view.figures, now), ("state", view.state(now).text)):
        print(f"  {name:<11} {value}")


def _draw(view: RunView) -> None:
    """Redraw the figures on the terminal until the run is finished."""
    from rich.console import Console

    from megabase.pipeline.training.progress import Block

    view.read()  # an error is reported without a drawing above it
    drawn = Block(view.name, Console(highlight=False))
    try:
        while True:
            now = time.time()
            state = view.state(now)
            view.read()
            drawn.draw(view.figures, now, state=state.text)
            if state.finished:
                return
            time.sleep(POLL_S)
    finally:
        drawn.close()


def _print_lines(view: RunView) -> None:
    """Print a line for each interval with news, and each new state, until the run is finished."""
    from megabase.pipeline.rundir.figures import line
    from megabase.pipeline.training.progress import LINE_S

    said, news, printed_at = "", False, 0.0
    while True:
        state = view.state(time.time())  # before the rows: those of a finished run are complete
        news = view.read() or news
        if view.figures.step and news and (state.finished or time.monotonic() - printed_at >= LINE_S):
            print(line(view.figures, time.time()), flush=True)
            news, printed_at = False, time.monotonic()
        if state.text != said:
            print(state.text, flush=True)
            said = state.text
        if state.finished:
            return
        time.sleep(POLL_S)
