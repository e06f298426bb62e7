"""What `prepare` and `index` share: options for the alphabet and the splits, and what they print."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megabase.pipeline.readable import counted

if TYPE_CHECKING:
    from megabase.datamodules.index.shard_index import ShardIndex

log = logging.getLogger(__name__)

_NAMES = ("alphabet", "valid", "test", "intervals", "split_by", "allow_other")
# Bytes of sequences that are not letters: they stay in the shards and have no loss.
_OTHERS = {"dna": "N, IUPAC codes, U, gaps", "protein": "X, B, Z, J, U, O, stops, gaps"}


def add_splits(parser: argparse.ArgumentParser) -> None:
    """Declare --alphabet, --valid, --test, --intervals, --split-by and --allow-other."""
    parser.add_argument(
        "--alphabet", choices=["dna", "protein", "bytes"], default="dna", help="bytes for text"
    )
    parser.add_argument(
        "--valid",
        metavar="X",
        help="validation: a fraction, or records by name and pattern: 'chr8,*_alt'",
    )
    parser.add_argument("--test", metavar="X", help="test: likewise")
    parser.add_argument(
        "--intervals", type=Path, metavar="BED", help="chr, start, end, split: instead of --valid and --test"
    )
    parser.add_argument(
        "--split-by",
        choices=["end", "record", "similarity"],
        default="end",
        help="a fraction is the end of every record; whole records: for reads and contigs; or whole groups of similar "
        "records: for many genomes (default: end)",
    )
    parser.add_argument(
        "--allow-other",
        action="store_true",
        help="accept RNA as dna, DNA as protein, and files that are mostly N",
    )


def splits_of(options: argparse.Namespace) -> dict[str, Any]:
    """The values of the options that `add_splits` declares, by name."""
    return {name: getattr(options, name) for name in _NAMES}


def print_splits(directory: str, index: ShardIndex, again: str) -> None:
    """Print how many records, shards and letters of each split `directory` holds.

    Args:
        directory: of the shards.
        index: of the shards.
        again: how to make them once more with other splits, for a message.
    """
    from megabase.datamodules.index.leakage import read_leakage
    from megabase.datamodules.index.segments import VALID

    segments = index.segments
    records = len(set(segments.record))
    print(f"{directory}: {counted(records, 'record')} in {counted(len(index.sizes), 'shard')}")
    unit = f"{index.alphabet.unit}s"
    leaks = {leak.split: leak.share for leak in read_leakage(index.store)}
    for split in segments.splits():
        total = int(segments.length[segments.rows_of(split)].sum())
        others = total - segments.letters_of(split)
        what = f", {others:,} of them not {index.alphabet.in_words} ({_OTHERS.get(index.alphabet.name)})"
        leak = f", {leaks[split]:.1%} of its 31-mers in train" if split in leaks else ""
        print(f"  {split:5} {total:>15,} {unit}{leak}{what if others else ''}")
    if VALID not in segments.splits():
        log.info(f"{directory}: nothing is for validation. To hold a tenth out: {again} with --valid 0.1")
