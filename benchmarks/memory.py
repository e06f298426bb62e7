"""Memory of one training step (loss and its gradients) against length, for each kind of layer.

    python -m benchmarks.memory [--lengths 64k,128k] [--layers local+lsh,local,lsh] [--dim 256] [--depth 4] ..

Each point is a process of its own (`pipeline/bench/lab.py`): its peak memory beyond the libraries, the weights and
their gradients; on a GPU the allocator's peak. What grows with the length is the slope between the shortest and the
longest length. It is printed in bytes per position and channel of the model (dim). Settings that no option names are
the model's defaults. No optimizer takes part.

With --sequence-ranks P, the step is that of one of P ranks that share the sequence: its exchanges are with itself
(`megabase.models.sequence.Loopback`), so its numbers are wrong and its memory is right. Positions are then those of
this rank.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from megabase.models import Reformer, ReformerConfig, Seeds
from megabase.models.config import ConfigError
from megabase.pipeline.bench.contest import Call, LeftOut
from megabase.pipeline.bench.lab import open_lab
from megabase.pipeline.bench.model_task import one_part
from megabase.pipeline.bench.options import DTYPES, device_of, lengths_of
from megabase.pipeline.errors import UserError
from megabase.pipeline.rundir import environment

SLOWEST_S = 1800.0
"""A step that takes twice as long is killed."""


@dataclass(frozen=True)
class Step:
    """The step to measure. The contestants of the lab are patterns of layers, such as `local+lsh`."""

    dim: int
    depth: int
    heads: int
    dtype: str
    device: str
    sequence_ranks: int
    offload_streams: bool = False
    vocab_size: int = 16

    def config(self, layers: str, length: int) -> ReformerConfig:
        """The model of a pattern of layers."""
        return ReformerConfig(
            vocab_size=self.vocab_size,
            dim=self.dim,
            depth=self.depth,
            heads=self.heads,
            layers=layers.split("+"),
            max_length=length,
            causal="linformer" not in layers,
        )

    def prepare(self, name: str, size: int, seed: int) -> Call:
        """A step of the model with the layers `name` on a sequence of `size` positions."""
        model = Reformer(self.config(name, size)).to(self.device, DTYPES[self.dtype]).train()
        model.body.stack.offload = self.offload_streams
        part = one_part(self.sequence_ranks, size)
        tokens = torch.randint(self.vocab_size, (1, size // self.sequence_ranks + 1), device=self.device)

        def step() -> None:
            model.loss(tokens[:, :-1], tokens[:, 1:], seeds=Seeds(seed), part=part).backward()

        return step

    def tiny(self, name: str) -> Call:
        """A step at a small length, which loads and compiles everything."""
        return self.prepare(name, 256 * self.sequence_ranks, 0)

    def weights_bytes(self, name: str, size: int) -> int:
        """Bytes of the weights and their gradients."""
        with torch.device("meta"):
            parameters = sum(p.numel() for p in Reformer(self.config(name, size)).parameters())
        return 2 * DTYPES[self.dtype].itemsize * parameters


def measure(step: Step, layers: str, length: int) -> dict[str, Any]:
    """One point. bytes: beyond the weights and their gradients."""
    row: dict[str, Any] = {"layers": layers, "length": length, "positions": length // step.sequence_ranks}
    try:
        probe = open_lab(step, step.device).probe(layers, length, SLOWEST_S)
    except LeftOut as error:
        return row | {"left_out": error.reason.text}
    assert probe.peak_bytes is not None
    return row | {
        "seconds": probe.seconds,
        "bytes": max(0, probe.peak_bytes - step.weights_bytes(layers, length)),
    }


def slope(rows: Sequence[dict[str, Any]], dim: int) -> float | None:
    """Bytes per position and channel between the shortest and the longest of the points of one pattern."""
    ran = sorted((row for row in rows if "bytes" in row), key=lambda row: row["positions"])
    if len(ran) < 2:
        return None
    positions = ran[-1]["positions"] - ran[0]["positions"]
    return float((ran[-1]["bytes"] - ran[0]["bytes"]) / positions / dim)


def print_row(row: dict[str, Any], dim: int) -> None:
    """One line of the table."""
    start = f"| {row['layers']} | {row['length']:,} | "
    if "left_out" in row:
        print(f"{start}{row['left_out']} | | |", flush=True)
        return
    each = row["bytes"] / row["positions"] / dim
    print(f"{start}{row['bytes'] / 2**20:,.0f} | {each:.1f} | {row['seconds']:.1f} |", flush=True)


def arguments() -> tuple[Step, list[int], list[str], Path | None]:
    """The step, the lengths, the patterns and the file of the command line. Ends with a message if they cannot work."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--lengths", default="64k,128k", help="positions of a sequence (default: %(default)s)"
    )
    parser.add_argument("--layers", default="local+lsh,local,lsh", help="patterns (default: %(default)s)")
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument(
        "--sequence-ranks",
        type=int,
        default=1,
        metavar="P",
        help="measure one of P ranks that share a sequence",
    )
    parser.add_argument(
        "--offload-streams", action="store_true", help="keep residual streams in host memory (GPUs)"
    )
    parser.add_argument("--json", type=Path, help="also write the points, with machine and versions")
    options = parser.parse_args()
    ranks = options.sequence_ranks
    try:
        step = Step(
            *(options.dim, options.depth, options.heads, options.dtype),
            *(device_of(options.device), ranks, options.offload_streams),
        )
        lengths, patterns = lengths_of("--lengths", options.lengths), options.layers.split(",")
        for layers in patterns:
            for length in lengths:
                step.config(layers, length).validate(length)
    except (UserError, ConfigError) as error:
        parser.error(str(error))
    if step.offload_streams and step.device == "cpu":
        parser.error("--offload-streams needs a GPU: without one streams are in host memory anyway")
    if ranks < 1 or any(number % ranks for number in (options.heads, *lengths)):
        parser.error(f"--sequence-ranks {ranks} must divide --heads {options.heads} and every length")
    return step, lengths, patterns, options.json


def main() -> None:
    """Measure every pattern at every length; print the table and the slopes, write the JSON."""
    step, lengths, patterns, output = arguments()
    rows: list[dict[str, Any]] = []
    print("| layers | length | MiB | bytes per position and channel | s |\n|---|---|---|---|---|")
    for layers in patterns:
        for length in lengths:
            rows.append(measure(step, layers, length))
            print_row(rows[-1], step.dim)
    slopes = {
        layers: slope([row for row in rows if row["layers"] == layers], step.dim) for layers in patterns
    }
    print("\nBytes per position and channel, from the shortest to the longest length:")
    for layers, found in slopes.items():
        print(f"{layers}: {'not measured' if found is None else f'{found:.1f}'}")
    if output:
        machine = environment.describe()
        machine["command"] = f"python -m benchmarks.memory {shlex.join(sys.argv[1:])}"
        described = {"step": asdict(step), "slopes": slopes, "rows": rows, "machine": machine}
        output.write_text(json.dumps(described, indent=1) + "\n")


if __name__ == "__main__":
    main()
