"""`megabase embed MODEL FASTA --output FILE`: the hidden states of a model, pooled over bases."""

from __future__ import annotations

import argparse

from megabase.pipeline.commands.use import add_model, add_output, add_regions, values

HELP = "hidden states of a model for the sequences of a FASTA file"
DESCRIPTION = (
    "Embed each record of a FASTA file, or each region of a BED file: the hidden states of one layer, pooled over"
    " bases. Long sequences are read in blocks, in constant memory; the block size changes nothing but the rounding. A"
    " call that was interrupted goes on where it stopped."
)


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.description = DESCRIPTION
    add_model(parser)
    add_regions(parser)
    parser.add_argument(
        "--layer", default="last", metavar="N", help="from 0; last: after the last norm (default: last)"
    )
    parser.add_argument(
        "--pool",
        default="mean",
        metavar="POOL",
        help="mean of all bases; last: the state after the last base; center:N: mean of the N central bases; bin:N:"
        " mean of every N bases; none: every base (default: mean)",
    )
    parser.add_argument(
        "--strand",
        choices=("mean", "concat", "forward", "reverse"),
        default="mean",
        help="mean of both strands, or both side by side, or one (default: mean)",
    )
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32", help="default: float32")
    add_output(parser, "the file to write: .parquet, .zarr or .h5ad")


def run(options: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    given = values(options)
    from megabase.pipeline.inference.embed import EmbedOptions
    from megabase.pipeline.inference.embed import run as embed

    return embed(EmbedOptions(**given))
