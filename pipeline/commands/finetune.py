"""`megabase finetune MODEL TABLE -o RUN [KEY=VALUE...]`: train a pretrained model on labelled sequences."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from megabase.pipeline.commands.choice import add_choice, chosen
from megabase.pipeline.errors import UserError
from megabase.pipeline.ranks.environment import is_rank
from megabase.pipeline.ranks.stop import StopRequest

HELP = "train a pretrained model on labelled sequences, and measure it"
DESCRIPTION = (
    "Train a head on a pretrained model, alone or with low-rank additions or with the whole model; then measure it on"
    " the test split beside a k-mer baseline. The same command goes on with a run that was stopped. With --predict:"
    " MODEL is the run of a fine-tuning, TABLE needs no labels, and the output is a Parquet file."
)
MODES, POOLS = ("probe", "lora", "full"), ("mean", "last")
TASKS = ("auto", "classification", "regression")


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.description = DESCRIPTION
    parser.add_argument("model", metavar="MODEL", type=Path, help="a run directory or an export")
    parser.add_argument(
        "table",
        metavar="TABLE",
        type=Path,
        help="CSV, TSV or Parquet with a sequence and a label in each row; a folder with SPLIT/CLASS.fa or"
        " SPLIT/CLASS/*.txt; with --genome BED or bigWig",
    )
    parser.add_argument(
        "settings", nargs="*", metavar="KEY=VALUE", help="such as trainer.max_steps=500 or optim.lr=1e-4"
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="RUN", help="the run directory")
    parser.add_argument(
        "--mode",
        choices=MODES,
        default=MODES[0],
        help="what is trained: the head (probe, the default), or more",
    )
    parser.add_argument(
        "--pool", choices=POOLS, default=POOLS[0], help="of the hidden states of a sequence (default: mean)"
    )
    parser.add_argument(
        "--lora-rank", type=int, default=8, metavar="N", help="of low-rank additions (default: 8)"
    )
    parser.add_argument("--task", choices=TASKS, default=TASKS[0], help="default: by the labels")
    for name in ("sequence", "label", "split"):
        parser.add_argument(f"--{name}", default=name, metavar="COLUMN", help=f"default: {name}")
    parser.add_argument(
        "--genome",
        type=Path,
        metavar="FASTA",
        help="TABLE is BED or bigWig, with labels of this genome's bases",
    )
    parser.add_argument(
        "--window",
        type=int,
        metavar="N",
        help="with --genome: bases of a window (default: that of the model's training)",
    )
    add_choice(parser)
    parser.add_argument(
        "--predict", action="store_true", help="predict with a fine-tuned model; do not train"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(options: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    for name in ("lora-rank", "window"):
        if (value := getattr(options, name.replace("-", "_"))) is not None and value < 1:
            raise UserError(f"--{name} {value}: must be 1 or more")
    if options.window and not options.genome:
        raise UserError("--window: only with --genome, which is cut into windows")
    if options.predict and options.genome:
        raise UserError("--genome: --predict takes sequences: give a table or FASTA as TABLE")
    # Before torch is imported, which takes seconds: a signal that comes meanwhile must not be lost.
    stop = StopRequest(answers=not is_rank()).listen()
    from megabase.pipeline.finetune.model import Method
    from megabase.pipeline.finetune.run import FinetuneOptions, predict
    from megabase.pipeline.finetune.run import run as finetune
    from megabase.pipeline.finetune.tables import Columns

    given: dict[str, Any] = {
        name: getattr(options, name)
        for name in ("model", "table", "output", "task", "genome", "window", "predict")
    }
    call = FinetuneOptions(
        **given,
        settings=tuple(options.settings),
        method=Method(options.mode, options.pool, options.lora_rank),
        columns=Columns(options.sequence, options.label, options.split),
        step=chosen(options.step),
        as_json=options.json,
    )
    return predict(call) if options.predict else finetune(call, _arguments(options), stop)


def _arguments(options: argparse.Namespace) -> list[str]:
    """The command line after `megabase finetune`."""
    names = (
        "output",
        "mode",
        "pool",
        "lora_rank",
        "task",
        "sequence",
        "label",
        "split",
        "genome",
        "window",
        "step",
    )
    values = {name: getattr(options, name) for name in names}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in values.items() if value is not None]
    return [str(options.model), str(options.table), *options.settings, *flags]
