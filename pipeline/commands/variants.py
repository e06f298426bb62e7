"""`megabase variants MODEL VCF --genome FASTA --output FILE`: how likely a model finds the variants of a VCF."""

from __future__ import annotations

import argparse
from pathlib import Path

from megabase.pipeline.commands.use import add_model, add_output, values
from megabase.pipeline.errors import UserError

HELP = "how likely a model finds the variants of a VCF, against the genome without them"
DESCRIPTION = (
    "Score each ALT of a VCF: the log-probability of the genome with it minus that of the genome without it. Counted:"
    " the bases that differ and those that follow, given all bases before. A chromosome is read once for each strand,"
    " and every variant continues from there. A call that was interrupted goes on where it stopped."
)
DOWNSTREAM = 1024


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.description = DESCRIPTION
    add_model(parser)
    parser.add_argument("vcf", metavar="VCF", type=Path, help="VCF or BCF, in any order")
    parser.add_argument(
        "--genome", type=Path, metavar="FASTA", required=True, help="as it is, or compressed with bgzip"
    )
    parser.add_argument(
        "--downstream",
        type=int,
        default=DOWNSTREAM,
        metavar="N",
        help=f"bases that are scored after a variant (default: {DOWNSTREAM})",
    )
    parser.add_argument(
        "--context", type=int, metavar="N", help="read only N bases before each variant (default: all)"
    )
    parser.add_argument(
        "--strand", choices=("both", "forward", "reverse"), default="both", help="default: both"
    )
    parser.add_argument(
        "--hash-seeds",
        type=int,
        default=1,
        metavar="K",
        help="average over K rotations of the hashes, and write the standard deviation (default: 1)",
    )
    parser.add_argument(
        "--null",
        type=int,
        default=0,
        metavar="N",
        help="compare each variant with N random ones of the same lengths (default: 0)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the random variants (default: 0)"
    )
    parser.add_argument(
        "--rename",
        action="append",
        default=[],
        metavar="FROM=TO",
        help="the name of a chromosome in the VCF, and in the genome; or a file with both on each line. Repeat it",
    )
    parser.add_argument(
        "--keep-going", action="store_true", help="skip and count variants that do not fit the genome"
    )
    add_output(parser, "the .vcf.gz or .parquet file to write")


def run(options: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    for name, least in (("downstream", 0), ("context", 0), ("hash_seeds", 1), ("null", 0), ("seed", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be {least} or more")
    if options.null == 1:
        raise UserError("--null 1: one random variant has no standard deviation: take 2 or more, better 100")
    given = values(options)
    from megabase.pipeline.inference.variants.command import VariantOptions
    from megabase.pipeline.inference.variants.command import run as variants

    return variants(VariantOptions(**given))
