"""`megabase prepare INPUT... OUTPUT`: sequence files to WebDataset shards with an index; `--check` verifies shards."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from megabase.pipeline.commands.splits import add_splits, print_splits, splits_of
from megabase.pipeline.errors import UserError
from megabase.pipeline.readable import counted

if TYPE_CHECKING:
    from megabase.datamodules.prepare.check import Damage

MOST_DAMAGES = 40
HELP = "sequence files to WebDataset shards with an index"


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "inputs",
        nargs="*",
        metavar="INPUT",
        help="FASTA, FASTQ, JSONL, or text with --alphabet bytes; plain, gzip, bgzip or zstd; files, directories "
        "of them, quoted globs, pipes, or - for the standard input",
    )
    parser.add_argument("output", metavar="OUTPUT", help="directory of shards to make")
    add_splits(parser)
    parser.add_argument(
        "--field", metavar="NAME", default="text", help="field of a JSONL line (default: text)"
    )
    parser.add_argument(
        "--prefix-names",
        action="store_true",
        help="put the name of the file before each record's: assembly1.contig_1",
    )
    parser.add_argument(
        "--similarity",
        type=float,
        metavar="X",
        help="with --split-by similarity: records that share a larger fraction of their 31-mers are in one split "
        "(default: 0.1)",
    )
    parser.add_argument("--jobs", type=int, metavar="N", help="processes (default: one per CPU)")
    parser.add_argument(
        "--portion",
        metavar="K/N",
        help="write only the K-th of N portions of the input files; when all are written, the same command without it "
        "makes OUTPUT of them",
    )
    parser.add_argument(
        "--check", action="store_true", help="verify the shards OUTPUT against their checksums"
    )


def run(options: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    return _check(options) if options.check else _prepare(options)


def _prepare(options: argparse.Namespace) -> int:
    from megabase.datamodules.prepare.run import prepare, prepare_portion

    if not options.inputs:
        raise UserError(
            f"prepare {options.output}: give INPUT... and then OUTPUT, a new directory for shards"
        )
    common = {
        "jobs": options.jobs,
        "field": options.field,
        "prefix_names": options.prefix_names,
        "similarity": options.similarity,
        "progress": sys.stderr.isatty(),
        **splits_of(options),
    }
    if options.portion:
        files = prepare_portion(options.inputs, options.output, options.portion, **common)
        done = (
            f"has {counted(files, 'input file')}, all written"
            if files
            else "has no input file: there are more portions than files"
        )
        print(
            f"{options.output}: portion {options.portion} {done}; when the others are written, the same command without"
            f" --portion makes {options.output}"
        )
        return 0
    index = prepare(options.inputs, options.output, **common)
    print_splits(options.output, index, "prepare into another directory")
    return 0


def _check(options: argparse.Namespace) -> int:
    from megabase.datamodules.index.shard_index import ShardIndex
    from megabase.datamodules.prepare.check import DamageError, check

    if options.inputs:
        raise UserError(f"prepare --check {options.inputs[0]} ...: give one directory of shards, no inputs")
    if options.portion:
        raise UserError("prepare --check reads a whole directory of shards: leave out --portion")
    splits = splits_of(options)
    if any(splits[name] is not None for name in ("valid", "test", "intervals")):
        raise UserError(
            "prepare --check compares shards with their checksums: leave out --valid, --test, --intervals"
        )
    try:
        letters = check(options.output, jobs=options.jobs, progress=sys.stderr.isatty())
    except DamageError as error:
        _show(error.damages)
        raise
    print(
        f"{options.output}: {letters:,} {ShardIndex.open(options.output).alphabet.unit}s match their checksums"
    )
    return 0


def _show(damages: list[Damage]) -> None:
    """Print a table of what is damaged."""
    from megabase.pipeline.tables import new_table, show

    table = new_table(
        ["shard", "record", "split", "place", "problem"], left=["shard", "record", "split", "problem"]
    )
    for damage in damages[:MOST_DAMAGES]:
        bases = f"{damage.start:,}-{damage.end:,}" if damage.record else ""
        table.add_row(damage.shard, damage.record, damage.split, bases, damage.problem)
    show(table)
    if len(damages) > MOST_DAMAGES:
        show(f"and {len(damages) - MOST_DAMAGES:,} more")
