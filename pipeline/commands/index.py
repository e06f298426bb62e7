"""`megabase index DIR`: an index for WebDataset tars that another program wrote."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megabase.pipeline.commands.splits import add_splits, print_splits, splits_of

HELP = "an index beside the tars that others wrote"


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("directory", metavar="DIR", help="of *.tar with .seq, .txt, .fasta or .npy members")
    add_splits(parser)


def run(options: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    from megabase.datamodules.index.index_file import INDEX_NAME
    from megabase.datamodules.prepare.foreign import index_tars

    index = index_tars(Path(options.directory), progress=sys.stderr.isatty(), **splits_of(options))
    again = f"remove {Path(options.directory) / INDEX_NAME} and index again"
    print_splits(options.directory, index, again)
    return 0
