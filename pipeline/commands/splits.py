"""What `prepare` and `index` share: the options that say which records go into which split, and what they print."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megabase.datamodules.index.shard_index import ShardIndex


def add_splits(parser: argparse.ArgumentParser) -> None:
    """Declare --alphabet, --valid, --test and --intervals."""
    parser.add_argument(
        "--alphabet", choices=["dna", "protein", "bytes"], default="dna", help="bytes for text"
    )
    parser.add_argument(
        "--valid", metavar="X", help="validation: a fraction of each record, or record names a,b"
    )
    parser.add_argument("--test", metavar="X", help="test: likewise")
    parser.add_argument(
        "--intervals", type=Path, metavar="BED", help="chr, start, end, split: instead of --valid and --test"
    )


def splits_of(options: argparse.Namespace) -> dict[str, Any]:
    """The values of the options that `add_splits` declares, by name."""
    return {name: getattr(options, name) for name in ("alphabet", "valid", "test", "intervals")}


def print_splits(directory: str, index: ShardIndex) -> None:
    """Print how many records, shards and bases of each split `directory` holds."""
    segments = index.segments
    records = len(set(segments.record))
    print(f"{directory}: {records:,} records in {len(index.sizes)} shards")
    for split in segments.splits():
        total = int(segments.length[segments.rows_of(split)].sum())
        print(
            f"  {split:5} {total:>15,} bases, {total - segments.letters_of(split):,} of them outside the alphabet"
        )
