"""`megabase data INDEX`: what is in a shard set."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

HELP = "what is in a shard set"


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("directory", metavar="INDEX", help="directory or URL of the shards")
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.add_argument(
        "--picture", type=Path, metavar="FILE.png", help="base composition and runs of N, drawn"
    )


def run(options: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    from megabase.datamodules.index.shard_index import ShardIndex
    from megabase.datamodules.report import description, picture

    index = ShardIndex.open(options.directory)
    found = description.describe(index)
    if options.picture:
        picture.draw(index, options.picture)
    print(json.dumps(found.as_dict(), indent=2) if options.json else description.text(found))
    return 0
