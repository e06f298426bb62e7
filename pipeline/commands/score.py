"""`megabase score MODEL FASTA --output FILE`: how likely a model finds each sequence of a FASTA file."""

from __future__ import annotations

import argparse
from pathlib import Path

from megabase.pipeline.commands.choice import add_choice, chosen
from megabase.pipeline.errors import UserError

HELP = "how likely a model finds each sequence of a FASTA file"
DESCRIPTION = (
    "Score each record of a FASTA file, or each region of a BED file: nats and bits per base, every base given all"
    " bases before it, in one walk and in constant memory. A call that was interrupted goes on where it stopped."
)


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.description = DESCRIPTION
    parser.add_argument("model", metavar="MODEL", type=Path, help="a run directory or an export")
    parser.add_argument("fasta", metavar="FASTA", type=Path, help="as it is, or compressed with bgzip")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE", required=True, help="the Parquet file to write"
    )
    parser.add_argument(
        "--regions", type=Path, metavar="BED", help="chr, start, end (default: all records, whole)"
    )
    parser.add_argument(
        "--strand", choices=("both", "forward", "reverse"), default="both", help="default: both"
    )
    parser.add_argument(
        "--block", type=int, default=1 << 14, metavar="N", help="bases read at a time (default: 16384)"
    )
    add_choice(parser)
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")


def run(options: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    if options.block < 1:
        raise UserError(f"--block {options.block}: must be 1 or more")
    given = {name: value for name, value in vars(options).items() if name != "command"}
    given["step"] = chosen(options.step)
    from megabase.pipeline.inference.score import ScoreOptions
    from megabase.pipeline.inference.score import run as score

    return score(ScoreOptions(**given))
