"""`megabase plan` against measurements: trainings on this machine's CPUs, and the records of one H100.

    python -m benchmarks.plan [--only NAME,NAME] [--records] [--json benchmarks/results/plan-cpu.json]

Each row is one `megabase train` in processes of its own, beside what the plan says of the same settings: the peak
memory of rank 0, libraries included, and the least CPU time of its steps, because the machine may have other work
(`plan_clock.py`); the plan's time is that without communication. Each rank has one core (OMP_NUM_THREADS=1). `beyond
libraries` compares what is left without LIBRARIES of `pipeline/plan/memory.py`.

--records compares with benchmarks/results/*-h100.json only, which takes no time. They were made by earlier code
(commits ede84ec and 0aa7d84), which kept more in memory: EARLIER has the figures of that code. They and the profile
h100 were fitted to these records, so this shows how well one set of figures fits all of them, not what it predicts of
other models.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megabase.datamodules.prepare.run import prepare
from megabase.models import LocalConfig, LSHConfig, ReformerConfig
from megabase.models.flops import keys_per_query
from megabase.pipeline.config.load import load
from megabase.pipeline.plan.activations import FEEDFORWARD, HEAD, Work, activations_of
from megabase.pipeline.plan.memory import LIBRARIES
from megabase.pipeline.plan.parameters import count_parameters
from megabase.pipeline.plan.profiles import read_profile
from megabase.pipeline.plan.request import planned
from megabase.pipeline.plan.step import launch_seconds, pass_seconds
from megabase.pipeline.rundir import environment

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
STEPS, WARM_UP = 4, 2
BASES = 1 << 20

BASE = [
    *("data.length=4096", "data.global_batch=1", "data.micro_batch=1", "model.dim=256", "model.depth=4"),
    *("model.heads=4", "trainer.devices=1", "zero.stage=2", "slurm.gpus=null", "slurm.cpus_per_task=1"),
    *(
        "trainer.eval_every_steps=0",
        "trainer.eval_sequences=1",
        "trainer.eval_recall=0",
        "trainer.log_every_steps=1",
    ),
    *(
        "checkpoint.every_steps=0",
        "checkpoint.every_minutes=0",
        "tracking.enabled=false",
        "trainer.precision=32",
    ),
    f"trainer.max_steps={STEPS}",
]
TRAININGS: dict[str, list[str]] = {
    "base: dim 256, depth 4, 4,096, stage 2, fp32": [],
    "length 16,384": ["data.length=16384"],
    "depth 12, dim 128": ["model.dim=128", "model.depth=12"],
    "dim 512, depth 2, micro batch 4 x 2,048": [
        *("model.dim=512", "model.depth=2", "data.length=2048", "data.micro_batch=4", "data.global_batch=4"),
    ],
    "stage 0": ["zero.stage=0"],
    "stage 1, 2 ranks, 2 accumulated": ["zero.stage=1", "trainer.devices=2", "data.global_batch=4"],
    "stage 3, 2 ranks, 25M parameters": [
        *("zero.stage=3", "trainer.devices=2", "data.global_batch=2", "model.dim=704", "model.depth=4"),
        *("data.length=2048", "model.heads=11"),
    ],
    "full layers": ["model.layers=[full]"],
    "lsh layers, rounds 8, swiglu": [
        *("model.layers=[lsh]", "model.lsh.rounds=8", "model.feedforward.activation=swiglu"),
    ],
    "bf16": ["trainer.precision=bf16"],
    "2 ranks share a window of 16,384": [
        *("data.length=16384", "trainer.devices=2", "trainer.sequence_ranks=2"),
    ],
}

EARLIER: Mapping[str, Work] = {
    "local": Work(fixed=25.0),
    "lsh": Work(fixed=25.25),
    FEEDFORWARD: Work(fixed=15.5),
    HEAD: Work(fixed=15.0),
}
"""What the code of the H100 records kept in memory beside the streams, as numbers of bf16."""


@dataclass(frozen=True)
class Row:
    """One comparison. memory in bytes, seconds of a step; None: not compared."""

    name: str
    memory: float | None
    planned_memory: float | None
    seconds: float | None
    planned_seconds: float | None
    libraries: float = 0.0

    def cells(self) -> list[str]:
        """The row of the table."""
        beyond = ""
        if self.libraries and self.memory and self.planned_memory:
            beyond = difference(self.memory - self.libraries, self.planned_memory - self.libraries)
        return [
            self.name,
            *sizes(self.memory, self.planned_memory),
            beyond,
            *times(self.seconds, self.planned_seconds),
        ]


def difference(measured: float, expected: float) -> str:
    """How much more, or less, was planned than measured."""
    return f"{expected / measured - 1:+.0%}"


def sizes(measured: float | None, expected: float | None) -> list[str]:
    """Measured and planned memory, and their difference."""
    if measured is None or expected is None:
        return ["", "", ""]
    return [f"{measured / 2**20:,.0f}", f"{expected / 2**20:,.0f}", difference(measured, expected)]


def times(measured: float | None, expected: float | None) -> list[str]:
    """Measured and planned seconds, and their difference."""
    if measured is None or expected is None:
        return ["", "", ""]
    return [f"{measured:.3g}", f"{expected:.3g}", difference(measured, expected)]


def make_shards(directory: Path) -> Path:
    """Shards of random DNA."""
    letters = np.frombuffer(b"ACGT", np.uint8)[np.random.default_rng(1).integers(0, 4, BASES)]
    (directory / "random.fa").write_bytes(b">random\n" + letters.tobytes() + b"\n")
    prepare([directory / "random.fa"], directory / "shards", progress=False)
    return directory / "shards"


def train(name: str, shards: Path, root: Path) -> Row:
    """Train with the settings of a name; the row of what was measured and planned."""
    run = f"run-{list(TRAININGS).index(name)}"
    settings = [f"run.name={run}", f"run.root={root}", f"data.shards={shards}", *BASE, *TRAININGS[name]]
    command = [sys.executable, "-m", "megabase.pipeline.cli", "train", *settings]
    clock = root / f"{run}.json"
    arguments = f"{{path: {clock}, steps: {WARM_UP}}}"
    command.append(f"trainer.callbacks=[{{class: benchmarks.plan_clock.Clock, arguments: {arguments}}}]")
    variables = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=variables, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr[-2000:]}")
    found = json.loads(clock.read_text())
    plan, _ = planned(load([], settings), "cpu")
    step = plan.speed.step
    alone = step.total - step.reduction - step.exchange
    return Row(name, found["peak"], plan.space.needed, min(found["seconds"]), alone, LIBRARIES)


def record(name: str) -> dict[str, Any]:
    """A record of benchmarks/results."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}-h100.json").read_text())
    return found


def records() -> Iterator[Row]:
    """The H100 records of whole models and of the attention layer."""
    for name in ("model", "longest"):
        found = record(name)
        for point in found["points"]:
            if point["contestant"] == "ours" and point["along"] != "depth" and point["peak_bytes"]:
                yield of_model(name, found["settings"], point)
    for name in ("attention", "attention-long"):
        found = record(name)
        for point in found["points"]:
            if point["contestant"] == "ours" and point["seconds"]:
                yield of_attention(name, found["settings"], point)


def of_model(name: str, settings: dict[str, Any], point: dict[str, Any]) -> Row:
    """A training step of a model in bf16, AdamW's states too."""
    length, h100 = point["size"], read_profile("h100")
    config = ReformerConfig(
        vocab_size=settings["vocab_size"],
        dim=settings["dim"],
        depth=settings["depth"],
        heads=settings["heads"],
        max_length=length,
        conv=0,
        values_ahead=False,
        lsh=LSHConfig(rounds=settings["rounds"], chunk_length=settings["chunk"]),
        local=LocalConfig(window=2 * settings["chunk"]),
    )
    states = 4 * 2 * sum(count_parameters(config).values())
    found = activations_of(config, length, 2, "cuda", work=EARLIER, in_groups=False)
    memory = h100.memory_gb_s * 1e9 * h100.achieved.memory
    computed = pass_seconds(config, length, h100.peak_flops("bf16"), memory, h100)
    seconds = max(length * sum(computed), launch_seconds(config, h100))
    title = f"{name}: dim {config.dim}, depth {config.depth}, {length:,}"
    measured = point["seconds"] or point["probe_seconds"]
    return Row(title, point["peak_bytes"], states + found.streams + found.work, measured, seconds)


def of_attention(name: str, settings: dict[str, Any], point: dict[str, Any]) -> Row:
    """One LSH layer's core, forward and backward: three times the forward pass. Launches dominate up to 32,768."""
    length, h100 = point["size"], read_profile("h100")
    inner = settings["heads"] * settings["head_dim"]
    config = ReformerConfig(
        vocab_size=9,
        dim=inner,
        heads=settings["heads"],
        lsh=LSHConfig(rounds=settings["rounds"], chunk_length=settings["chunk"]),
    )
    work = 3 * 4.0 * inner * keys_per_query(config, "lsh", length) * length
    seconds = work / (h100.peak_flops("bf16") * h100.achieved.lsh)
    title = f"{name}: {settings['heads']} heads of {settings['head_dim']}, {length:,}"
    if length <= 1 << 15:
        return Row(f"{title} (launches: not compared)", None, None, None, None)
    return Row(title, None, None, point["seconds"], seconds)


def show(rows: list[Row]) -> None:
    """Print the table."""
    head = ["", "MiB", "plan", "", "beyond libraries", "s", "plan", ""]
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for row in rows:
        print(f"| {' | '.join(row.cells())} |")


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", metavar="NAME,NAME", help="trainings whose name begins so")
    parser.add_argument("--records", action="store_true", help="compare with the H100 records only")
    parser.add_argument("--json", type=Path, help="also write the rows, with machine and versions")
    options = parser.parse_args()
    rows = []
    started = time.monotonic()
    if not options.records:
        only = tuple(options.only.split(",")) if options.only else ("",)
        with tempfile.TemporaryDirectory() as scratch:
            shards = make_shards(Path(scratch))
            for name in TRAININGS:
                if name.startswith(only):
                    rows.append(train(name, shards, Path(scratch)))
                    print(f"{time.monotonic() - started:.0f} s: {' | '.join(rows[-1].cells())}", flush=True)
    found = [*rows, *records()]
    show(found)
    if options.json:
        machine = environment.describe()
        machine["command"] = f"python -m benchmarks.plan {shlex.join(sys.argv[1:])}"
        described = {"rows": [asdict(row) for row in found], "machine": machine}
        options.json.write_text(json.dumps(described, indent=1) + "\n")


if __name__ == "__main__":
    main()
