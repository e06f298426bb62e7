"""What it costs to read a genome in blocks (`megabase.models.generation.read_block`), on one CPU core.

    python -m benchmarks.blocks [--bases 4M] [--block 16k] [--dim 64] [--depth 4] [--json FILE]

The model has random weights and alternates local and LSH layers. It reads E. coli from examples/data, and prints:
- position: microseconds for each base and the size of the state, at marks on the way through the genome;
- speed: blocks of several sizes from the state at the end, a pass of the same length without a state (the forward pass
  of a training step), and single tokens.
Times are CPU seconds of this process, so that other work on the machine disturbs them less; wall time is in the JSON.
"""

from __future__ import annotations

import argparse
import gzip
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megabase.datamodules.alphabet import BOS, Alphabet
from megabase.models import LSHConfig, Reformer, ReformerConfig, Seeds, generation
from megabase.pipeline.rundir import environment

GENOME = Path(__file__).resolve().parents[1] / "examples" / "data" / "ecoli_536.fna.gz"
MARKS = (10_000, 100_000, 300_000, 1_000_000, 2_000_000, 4_000_000)
SIZES = (1 << 12, 1 << 14, 1 << 16)
SINGLE_TOKENS = 100


@dataclass
class Cost:
    """What reading some bases took. position: where they end."""

    what: str
    position: int
    bases: int
    cpu_seconds: float
    wall_seconds: float
    state_mebibytes: float

    @property
    def per_base(self) -> float:
        """Microseconds of CPU time."""
        return self.cpu_seconds / self.bases * 1e6


def number(text: str) -> int:
    """Read "16k" (1,024s) or "4M" (millions)."""
    factors = {"k": 1024, "M": 1_000_000}
    return int(text[:-1]) * factors[text[-1]] if text[-1] in factors else int(text)


def genome(bases: int) -> Tensor:
    """Tokens (1, bases): BOS and the start of the first record."""
    with gzip.open(GENOME, "rb") as file:
        file.readline()
        letters = file.read().split(b">")[0].replace(b"\n", b"")[: bases - 1]
    codes = Alphabet.named("dna").encode(np.frombuffer(letters, dtype=np.uint8))
    return torch.tensor([[BOS, *codes.tolist()]])


def timed(run: Callable[[], object]) -> tuple[float, float]:
    """CPU and wall seconds."""
    cpu, wall = time.process_time(), time.perf_counter()
    run()
    return time.process_time() - cpu, time.perf_counter() - wall


def walk(model: Reformer, tokens: Tensor, state: generation.State, block: int) -> list[Cost]:
    """Read all tokens; one Cost for each stretch between two marks."""
    costs = []
    for mark in (*(mark for mark in MARKS if mark < tokens.shape[1]), tokens.shape[1]):
        stretch = tokens[:, state.position : mark]
        if not stretch.shape[1]:
            continue
        seconds = timed(
            lambda stretch=stretch: [
                generation.read_block(model, part, state) for part in stretch.split(block, 1)
            ]
        )
        costs.append(Cost("position", mark, stretch.shape[1], *seconds, state.nbytes / 2**20))
        print(f"| {mark:,} | {costs[-1].per_base:.1f} | {costs[-1].state_mebibytes:.1f} |", flush=True)
    return costs


def speed(model: Reformer, tokens: Tensor, state: generation.State) -> list[Cost]:
    """Blocks from the state, passes without one, single tokens."""
    costs = []

    def add(what: str, bases: int, run: Callable[[], object]) -> None:
        costs.append(Cost(what, state.position, bases, *timed(run), state.nbytes / 2**20))
        print(f"| {what} | {bases:,} | {costs[-1].per_base:.1f} |", flush=True)

    for size in SIZES:
        part = tokens[:, :size]
        add("pass without a state", size, lambda part=part: model.loss(part, part))
        fork = state.fork([0])
        add("block", size, lambda part=part, fork=fork: generation.read_block(model, part, fork))
    fork = state.fork([0])
    generation.read(model, tokens[:, :1], fork)
    singles = tokens[:, :SINGLE_TOKENS].split(1, 1)
    add("single tokens", SINGLE_TOKENS, lambda: [generation.read(model, token, fork) for token in singles])
    return costs


@torch.no_grad()
def main() -> None:
    """Measure and print both tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bases", type=number, default=number("4M"), help="how far to read")
    parser.add_argument("--block", type=number, default=number("16k"), help="bases read at a time")
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--json", type=Path, help="also write the rows, with machine and versions")
    options = parser.parse_args()
    torch.set_num_threads(1)
    config = ReformerConfig(
        vocab_size=9,
        dim=options.dim,
        depth=options.depth,
        heads=4,
        layers=["local", "lsh"],
        max_length=1 << 14,
        lsh=LSHConfig(duplicates="once"),
    )
    torch.manual_seed(0)
    model = Reformer(config).eval()
    tokens = genome(options.bases)
    model.loss(tokens[:, :2048], tokens[:, :2048])  # compiles the kernel
    state = generation.start(model, 1, seeds=Seeds())
    print("| position | µs/base since the row above | state, MiB |\n|---|---|---|")
    costs = walk(model, tokens, state, options.block)
    print("\n| | bases | µs/base |\n|---|---|---|")
    costs += speed(model, tokens, state)
    if options.json:
        machine = environment.describe()
        machine["command"] = f"python -m benchmarks.blocks --bases {options.bases} --block {options.block}"
        rows = [asdict(cost) | {"microseconds_per_base": cost.per_base} for cost in costs]
        described = {"config": asdict(config), "rows": rows, "machine": machine}
        options.json.write_text(json.dumps(described, indent=1) + "\n")


if __name__ == "__main__":
    main()
