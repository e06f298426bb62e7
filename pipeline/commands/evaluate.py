"""`megabase evaluate MODEL [KEY=VALUE...]`: bits per base on held-out windows, and what the context gains."""

from __future__ import annotations

import argparse
from pathlib import Path

from megabase.pipeline.commands.choice import add_choice, chosen
from megabase.pipeline.errors import UserError

HELP = "how well a model predicts held-out sequence, and what its context gains"
DESCRIPTION = (
    "Score the windows of a split with a trained model: bits per base, with bootstrap intervals, by position, by"
    " length of context and by class; and recall: how much better a copy is predicted than the same bases without"
    " its source. On several ranks with trainer.devices=N."
)


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.description = DESCRIPTION
    parser.add_argument("model", metavar="MODEL", type=Path, help="a run directory or an export")
    parser.add_argument(
        "settings",
        nargs="*",
        metavar="KEY=VALUE",
        help="settings over those of the run, such as trainer.devices=2 or data.micro_batch=8",
    )
    parser.add_argument("--split", default="test", metavar="NAME", help="default: test")
    parser.add_argument("--shards", metavar="DIR", help="directory or URL (default: those of the training)")
    parser.add_argument(
        "--length",
        metavar="L,L",
        help="bases of a window (default: those of the training). With several, the longest is that, and the same bases"
        " are scored in contexts of each length as well",
    )
    add_choice(parser)
    parser.add_argument(
        "--windows", type=int, default=0, metavar="N", help="windows, spread over the split (default: all)"
    )
    parser.add_argument(
        "--recall",
        type=int,
        default=32,
        metavar="N",
        help="windows to measure recall in; 0: none (default: 32)",
    )
    parser.add_argument(
        "--bed",
        "--annotation",
        dest="annotation",
        type=Path,
        metavar="FILE",
        help="classes of bases: GFF3 or GTF, by type; or BED (chr, start, end, class)",
    )
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="write evaluation.json and evaluation.png there"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")


def run(options: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    for name in ("windows", "recall"):
        if getattr(options, name) < 0:
            raise UserError(f"--{name} {getattr(options, name)}: must be 0 or more")
    given = {name: value for name, value in vars(options).items() if name != "command"}
    given |= {"settings": tuple(options.settings), "step": chosen(options.step)}
    from megabase.pipeline.bench.options import lengths_of
    from megabase.pipeline.inference.evaluation.run import EvaluateOptions
    from megabase.pipeline.inference.evaluation.run import run as evaluate

    length = given.pop("length")
    lengths = tuple(lengths_of("--length", length)) if length is not None else ()
    return evaluate(EvaluateOptions(**given, lengths=lengths), _arguments(options))


def _arguments(options: argparse.Namespace) -> list[str]:
    """The command line after `megabase evaluate`."""
    names = ("split", "shards", "length", "step", "windows", "recall", "annotation", "output")
    chosen = {name: getattr(options, name) for name in names}
    flags = [f"--{name}={value}" for name, value in chosen.items() if value is not None]
    return [str(options.model), *options.settings, *flags, *(["--json"] if options.json else [])]
