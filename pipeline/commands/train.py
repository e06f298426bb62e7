"""`megabase train CONFIG... [KEY=VALUE...]`: train, or resume, the run that a config describes."""

from __future__ import annotations

import argparse

from megabase.pipeline.commands.settings import add_settings, split_settings
from megabase.pipeline.ranks.environment import is_rank
from megabase.pipeline.ranks.stop import StopRequest

HELP = "train, or resume, the run that a config describes"


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_settings(parser)
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="show what the run will be (parameters, memory, batches, epochs, what it resumes from); start nothing",
    )


def run(options: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    if options.dry_run:
        from megabase.pipeline.config.load import load
        from megabase.pipeline.training.dry_run import dry_run

        dry_run(load(*split_settings(options.settings)), options.settings)
        return 0
    # Before torch is imported, which takes seconds: a signal that comes meanwhile must not be lost.
    stop = StopRequest(answers=not is_rank()).listen()
    from megabase.pipeline.config.load import load
    from megabase.pipeline.training.run import train

    files, overrides = split_settings(options.settings)
    return train(load(files, overrides), options.settings, stop)
