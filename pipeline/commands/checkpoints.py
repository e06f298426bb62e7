"""`megabase checkpoints RUN`: the checkpoints of a run and whether they are complete. Needs no torch."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

HELP = "a run's checkpoints, and whether they are complete"


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("directory", metavar="RUN", help="run directory; it may be training")
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.add_argument("--fast", action="store_true", help="compare names and sizes, not every byte")


def run(options: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    from megabase.pipeline.checkpoint import listing
    from megabase.pipeline.rundir.paths import RunPaths
    from megabase.pipeline.tables import show

    run = Path(options.directory)
    entries = listing.list_run(run, fast=options.fast, progress=sys.stderr.isatty())
    if options.json:
        print(listing.as_json(run, entries))
    else:
        table = listing.as_table(entries, in_bits=not RunPaths(run).finetune.exists())
        show(table, *listing.conclusions(run, entries))
    return 0
