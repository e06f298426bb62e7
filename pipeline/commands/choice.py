"""What commands that use a model share: the choice of a run's checkpoint on the command line."""

from __future__ import annotations

import argparse

from megabase.pipeline.errors import UserError

BEST = "best"


def add_choice(parser: argparse.ArgumentParser) -> None:
    """Declare `--step N` and `--best`."""
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument(
        "--step", metavar="N", help="step of the checkpoint, or best (default: the newest that verifies)"
    )
    choice.add_argument(
        "--best",
        action="store_const",
        const=BEST,
        dest="step",
        help="the checkpoint with the lowest validation loss",
    )


def chosen(step: str | None) -> int | str | None:
    """The step of `--step N`, BEST, or None for the newest. Raises UserError for anything else."""
    if step is None or step == BEST:
        return step
    if not step.isdecimal():
        raise UserError(f"--step {step}: give the step of a checkpoint, or best")
    return int(step)
