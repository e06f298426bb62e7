"""`megabase generate MODEL --output FILE`: sequences that a model draws, after prompts or from nothing."""

from __future__ import annotations

import argparse
from pathlib import Path

from megabase.pipeline.commands.use import add_model, add_output, values

HELP = "sequences that a model draws, after prompts or from nothing"
DESCRIPTION = (
    "Draw sequences letter by letter: A, C, G and T for a model of DNA. The same seed draws the same sequences. FILE"
    " gets the letters after the prompt; a JSONL file beside it the log-probability of each. A call that was"
    " interrupted goes on where it stopped."
)


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.description = DESCRIPTION
    add_model(parser)
    parser.add_argument(
        "--length", type=int, required=True, metavar="N", help="letters of each sequence, without its prompt"
    )
    parser.add_argument(
        "-n", "--number", type=int, default=1, metavar="N", help="sequences for each prompt (default: 1)"
    )
    parser.add_argument(
        "--prompts", type=Path, metavar="FASTA", help="what sequences begin with (default: nothing)"
    )
    parser.add_argument(
        "--temperature", type=float, default=1.0, metavar="T", help="0: the likeliest (default: 1)"
    )
    parser.add_argument(
        "--top-k", type=int, metavar="K", help="draw from the K likeliest letters (default: all)"
    )
    parser.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        help="draw from the fewest letters that have probability P together",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the draws (default: 0)")
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="MOTIF",
        help="end a sequence after this motif; repeatable",
    )
    parser.add_argument(
        "--forbid",
        action="append",
        default=[],
        metavar="MOTIF",
        help="no sequence has this motif; repeatable",
    )
    parser.add_argument(
        "--forbid-strand",
        choices=("both", "forward"),
        default="both",
        help="strands of DNA on which --forbid looks (default: both)",
    )
    parser.add_argument("--gc", metavar="LO:HI", help="share of G and C in each sequence, such as 0.4:0.6")
    parser.add_argument(
        "--batch", type=int, default=16, metavar="N", help="sequences that are read together (default: 16)"
    )
    add_output(parser, "the FASTA file to write: .fa, .fasta, .fna or .faa")


def run(options: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    given = values(options)
    from megabase.pipeline.inference.generate import GenerateOptions
    from megabase.pipeline.inference.generate import run as generate

    return generate(GenerateOptions(**given))
