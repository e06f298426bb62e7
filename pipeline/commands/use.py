"""Arguments that the commands share which use a model: score, variants, embed, generate."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from megabase.pipeline.commands.choice import add_choice, chosen
from megabase.pipeline.errors import UserError

BLOCK = 1 << 14


def add_model(parser: argparse.ArgumentParser) -> None:
    """Declare MODEL, the first argument."""
    parser.add_argument("model", metavar="MODEL", type=Path, help="a run directory or an export")


def add_regions(parser: argparse.ArgumentParser) -> None:
    """Declare FASTA and `--regions`."""
    parser.add_argument("fasta", metavar="FASTA", type=Path, help="as it is, or compressed with bgzip")
    parser.add_argument(
        "--regions", type=Path, metavar="BED", help="chr, start, end (default: all records, whole)"
    )


def add_output(parser: argparse.ArgumentParser, text: str) -> None:
    """Declare `--output`, which `text` describes, and the options that follow the model's and the input's."""
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", required=True, help=text)
    parser.add_argument(
        "--block", type=int, default=BLOCK, metavar="N", help=f"letters read at a time (default: {BLOCK})"
    )
    parser.add_argument(
        "--portion",
        metavar="K/N",
        help="do only the K-th of N portions of the work; auto: by the rank of srun or torchrun and the element of the "
        "job array. The process that finishes last writes the output",
    )
    add_choice(parser)
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")


def values(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments by name, with `step` and `portion` parsed. Raises UserError or DataError for wrong ones."""
    # Imported here, because it imports torch.
    from megabase.pipeline.inference.partial import parse_portion

    if options.block < 1:
        raise UserError(f"--block {options.block}: must be 1 or more")
    given = {name: value for name, value in vars(options).items() if name != "command"}
    return given | {"step": chosen(options.step), "portion": parse_portion(options.portion)}
