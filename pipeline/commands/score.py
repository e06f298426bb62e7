"""`megabase score MODEL FASTA --output FILE`: how likely a model finds each sequence of a FASTA file."""

from __future__ import annotations

import argparse

from megabase.pipeline.commands.use import add_model, add_output, add_regions, values
from megabase.pipeline.errors import UserError

HELP = "how likely a model finds each sequence of a FASTA file"
DESCRIPTION = (
    "Score each record of a FASTA file, or each region of a BED file: nats and bits per base, every base given all"
    " bases before it, in one walk and in constant memory. A call that was interrupted goes on where it stopped."
)


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.description = DESCRIPTION
    add_model(parser)
    add_regions(parser)
    parser.add_argument(
        "--strand", choices=("both", "forward", "reverse"), default="both", help="default: both"
    )
    parser.add_argument(
        "--track",
        metavar="NAMES",
        help="write bigWig files into FILE.tracks too: logp, entropy, acgt, with commas between them",
    )
    parser.add_argument(
        "--assembly", metavar="NAME", help="the genome in FILE.tracks/hub.txt (default: the name of FASTA)"
    )
    add_output(parser, "the Parquet file to write")


def run(options: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    given = values(options)
    from megabase.pipeline.inference.score import ScoreOptions
    from megabase.pipeline.inference.score import run as score
    from megabase.pipeline.inference.tracks import Tracks

    if options.assembly and options.track is None:
        raise UserError(
            f"--assembly {options.assembly}: it names the genome of tracks: add --track, or leave it out"
        )
    given["tracks"] = Tracks.parse(given.pop("track"))
    return score(ScoreOptions(**given))
