"""Train small models side by side, and print which of them use their context.

    python -m benchmarks.learning recall --length 512 --models ours,paper,full [--json FILE]
    python -m benchmarks.learning homology --genome A.fna.gz --relative B.fna.gz --length 4096
    python -m benchmarks.learning duplication
    python -m benchmarks.learning sequence --file FASTA --models ours,full

The tables of docs/model.md name their commands. A table with --json is written after every model, and a model that is
in the file already is not trained again. Everything is a function of --seed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.learning import duplication, homology, recall, sequence
from benchmarks.learning.models import MODELS, Size
from benchmarks.learning.training import Budget
from megabase.datamodules.alphabet import Alphabet
from megabase.datamodules.files import publish_json
from megabase.pipeline.bench.result import machine
from megabase.pipeline.tables import new_table, show

Row = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one table; returns an exit code."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    options.run(options)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.learning", description=__doc__.split("\n")[0])
    tables = parser.add_subparsers(required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--models", default="ours,paper,local,full,performer", help=f"of {', '.join(MODELS)}")
    common.add_argument("--length", type=int, default=512, help="tokens of a window")
    common.add_argument("--steps", type=int, default=300, help="optimizer steps at most")
    common.add_argument("--lr", type=float, default=3e-3)
    common.add_argument("--every", type=int, default=25, help="steps between two evaluations")
    common.add_argument("--seed", type=int, default=0)
    common.add_argument("--dim", type=int, default=64)
    common.add_argument("--depth", type=int, default=4)
    common.add_argument("--heads", type=int, default=2)
    common.add_argument("--chunk", type=int, default=32, help="chunk_length of the lsh layers")
    common.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    common.add_argument("--threads", type=int, default=torch.get_num_threads())
    common.add_argument("--json", type=Path, help="write the table to this file")
    one = tables.add_parser("recall", parents=[common], help="random DNA with a copy in every window")
    one.add_argument("--copy", type=int, default=192, help="bases of the copy")
    one.add_argument("--changed", type=float, default=0.0, help="share of changed bases while training")
    one.add_argument(
        "--inverted", action="store_true", help="half of the sources are inverted while training"
    )
    one.add_argument("--masked", type=float, help="share of bases to mask and predict from both sides")
    one.add_argument("--tokens", type=int, default=8192, help="tokens of a step")
    one.set_defaults(run=_recall)
    one = tables.add_parser("homology", parents=[common], help="a stretch of a genome follows its relative's")
    one.add_argument("--genome", type=Path, required=True, help="FASTA; its last tenth is held out")
    one.add_argument(
        "--relative", type=Path, help="FASTA of a relative; without it, 3 %% of the copy's bases change"
    )
    one.add_argument("--copy", type=int, default=1024, help="bases of a stretch")
    one.add_argument("--windows", type=int, default=4, help="windows of a step")
    one.add_argument("--probes", type=int, default=16, help="windows that are scored")
    one.set_defaults(run=_homology)
    one = tables.add_parser("duplication", parents=[common], help="the task of the paper's table 2")
    one.add_argument("--word", type=int, default=511, help="symbols of the word that comes twice")
    one.add_argument("--batch", type=int, default=8, help="sequences of a step")
    one.set_defaults(run=_duplication)
    one = tables.add_parser("sequence", parents=[common], help="a genome or a text as it is")
    one.add_argument("--file", type=Path, required=True, help="FASTA, or text with --alphabet bytes")
    one.add_argument("--alphabet", default="dna")
    one.add_argument("--windows", type=int, default=4, help="windows of a step")
    one.set_defaults(run=_sequence)
    return parser


def _recall(options: argparse.Namespace) -> None:
    names = ("length", "copy", "changed", "inverted", "masked", "tokens")
    task = recall.Task(**{name: getattr(options, name) for name in names})
    rows = _rows(options, "recall", lambda name: recall.run(name, task, _size(options), _budget(options)))
    gaps = task.gaps()
    headings = ["model", "steps", *(f"{gap} away" for gap in gaps), "3 % changed", "inverted", "tokens/s"]
    table = new_table(headings, left=["model"])
    for row in rows:
        costs = [*(row["by_distance"][str(gap)] for gap in gaps), row["changed"], row["inverted"]]
        steps = str(row["steps"] or f"> {row['trained_steps']}")
        table.add_row(row["model"], steps, *(f"{cost:.2f}" for cost in costs), f"{_speed(row):,.0f}")
    show(f"bits per base on the copy; steps until {recall.LEARNED}", table)


def _homology(options: argparse.Namespace) -> None:
    genome = homology.read_genome(options.genome)
    relative = None if options.relative is None else homology.read_genome(options.relative)
    task = homology.Task(genome, relative, options.length, options.copy, options.windows)
    budget = dataclasses.replace(_budget(options), least=0.1)
    rows = _rows(
        options, "homology", lambda name: homology.run(name, task, _size(options), budget, options.probes)
    )
    table = new_table(["model", "copy", "without source", "least possible", "tokens/s"], left=["model"])
    for row in rows:
        costs = [f"{row[key]:.3f}" for key in ("copy", "alone", "least")]
        table.add_row(row["model"], *costs, f"{_speed(row):,.0f}")
    show("bits per base on held-out stretches that follow their relative's", table)


def _duplication(options: argparse.Namespace) -> None:
    task = duplication.Task(options.word, options.batch)
    budget = dataclasses.replace(_budget(options), least=0.0)
    rows = _rows(options, "duplication", lambda name: duplication.run(name, task, _size(options), budget))
    headings = [str(rounds) for rounds in duplication.ROUNDS]
    table = new_table(["model", *headings, "steps"], left=["model"])
    for row in rows:
        shares = [f"{row['accuracy'][heading]:.2f}" for heading in headings]
        table.add_row(row["model"], *shares, str(row["trained_steps"]))
    show("% of the second word predicted, by the rounds of the evaluation", table)


def _sequence(options: argparse.Namespace) -> None:
    task = sequence.Task(options.file, options.alphabet, options.length, options.windows)
    size = dataclasses.replace(_size(options), vocab_size=Alphabet.named(options.alphabet).vocab_size)
    budget = dataclasses.replace(_budget(options), least=0.05)
    rows = _rows(options, "sequence", lambda name: sequence.run(name, task, size, budget))
    table = new_table(["model", "bits", "steps", "tokens/s"], left=["model"])
    for row in rows:
        table.add_row(row["model"], f"{row['bits']:.4f}", str(row["trained_steps"]), f"{_speed(row):,.0f}")
    show("bits per letter of the last tenth of the file", table)
    contexts = list(rows[0]["by_context"])
    table = new_table(["model", *(f"{int(length):,}" for length in contexts)], left=["model"])
    for row in rows:
        table.add_row(row["model"], *(f"{row['by_context'][length]:.4f}" for length in contexts))
    show(f"bits of the last {sequence.LAST} letters of a window, by the letters that are read", table)


def _speed(row: Row) -> float:
    """Tokens a second while training."""
    return float(row["tokens_per_step"] * row["trained_steps"] / row["seconds"])


def _size(options: argparse.Namespace) -> Size:
    return Size(options.dim, options.depth, options.heads, options.chunk)


def _budget(options: argparse.Namespace) -> Budget:
    return Budget(options.steps, options.lr, every=options.every, seed=options.seed, device=options.device)


def _rows(options: argparse.Namespace, name: str, run: Callable[[str], Row]) -> list[Row]:
    """The rows of all models asked for, in their order; those that the file has are not trained again."""
    path: Path | None = options.json
    settings = {
        key: value.name if isinstance(value, Path) else value
        for key, value in vars(options).items()
        if key not in ("run", "json", "models", "threads")
    }
    rows: dict[str, Row] = {}
    if path is not None and path.exists():
        kept = json.loads(path.read_text())
        if kept["settings"] == settings:
            rows = {row["model"]: row for row in kept["rows"]}
    names = options.models.split(",")
    for model in names:
        if model in rows:
            continue
        rows[model] = json.loads(json.dumps(run(model)))  # keys are strings, as in the file
        if path is not None:
            table = {"table": name, "machine": machine(options.device), "threads": options.threads}
            publish_json(path, table | {"settings": settings, "rows": list(rows.values())})
        print(f"{model}: {rows[model]['curve'][-1]}", flush=True)
    return [rows[model] for model in names]


if __name__ == "__main__":
    raise SystemExit(main())
