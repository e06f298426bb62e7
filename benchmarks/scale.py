"""The table of docs/scale.md: one model on 8 to 1,024 H100 at three lengths, computed by `megabase plan`, not measured.

    python -m benchmarks.scale [--write]

For each length and number of GPUs, the ranks that share a window are chosen: of the numbers with which the run fits,
those that need the fewest windows in a step, and of these the fastest. A step has 134 million bases, or as many windows
as the ranks need. --write puts the table into docs/scale.md, between its two markers.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from megabase.pipeline.config.load import load
from megabase.pipeline.config.schema import RunConfig
from megabase.pipeline.plan.limits import works
from megabase.pipeline.plan.profiles import read_profile
from megabase.pipeline.plan.run import Plan, plan
from megabase.pipeline.readable import readable_size

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "scale.md"
BEGIN, END = "<!-- computed by python -m benchmarks.scale -->", "<!-- end of the table -->"
LENGTHS = (1 << 17, 1 << 20, 1 << 22)
GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
SHARING = (1, 2, 4, 8, 16)
TOKENS = 1 << 27
"""Bases of a step where the ranks do not need more."""

SETTINGS = [
    "run.name=scale",
    "data.shards=none",
    "model.dim=1024",
    "model.heads=16",
    "trainer.precision=bf16",
]


def config_of(length: int, gpus: int, sharing: int) -> RunConfig:
    """human-1m.yaml with a wider model, whose heads more ranks can share."""
    windows = max(TOKENS // length, gpus // sharing)
    nodes = [f"trainer.nodes={gpus // 8}", "trainer.devices=8", f"trainer.sequence_ranks={sharing}"]
    sizes = [f"data.length={length}", f"model.max_length={length}", f"data.global_batch={windows}"]
    config = load([ROOT / "configs" / "human-1m.yaml"], [*SETTINGS, *nodes, *sizes])
    config.model.vocab_size = 9
    return config


def plans(length: int, gpus: int) -> Iterator[Plan]:
    """The plans that fit, for each number of ranks that share a window."""
    h100 = read_profile("h100")
    for sharing in (each for each in SHARING if each <= gpus):
        config = config_of(length, gpus, sharing)
        if works(config) and (found := plan(config, None, "bf16", h100)).space.fits:
            yield found


def best(length: int, gpus: int) -> Plan | None:
    """The plan with the fewest windows in a step, of these the fastest; None if none fits."""
    found = list(plans(length, gpus))
    return min(
        found, key=lambda each: (each.batches.global_batch, -each.speed.tokens_per_second), default=None
    )


def row(length: int, gpus: int) -> str:
    """One row of the table."""
    found = best(length, gpus)
    if found is None:
        return f"| {length:,} | {gpus:,} | none fits | | | | | | memory |"
    batches, speed = found.batches, found.speed
    shares = sorted(speed.step.shares.items(), key=lambda each: -each[1])
    million = batches.tokens_per_step / 1e6
    cells = [
        f"{length:,}",
        f"{gpus:,}",
        str(batches.sequence_ranks),
        f"{batches.global_batch:,} ({million:,.0f}M)",
        readable_size(found.space.needed),
        f"{speed.step.total:.3g} s",
        f"{speed.tokens_per_second / 1e6:,.1f}M",
        f"{speed.mfu:.0%}",
        ", ".join(f"{kind} {share:.0%}" for kind, share in shares if share >= 0.01),
    ]
    return f"| {' | '.join(cells)} |"


def table() -> str:
    """The table in Markdown."""
    heads = [
        *("length", "GPUs", "share a window", "windows of a step (bases)", "memory of a GPU", "step"),
        *("bases/s", "MFU", "what takes the time"),
    ]
    return "\n".join(
        [
            f"| {' | '.join(heads)} |",
            "|" + "---|" * len(heads),
            *(row(length, gpus) for length in LENGTHS for gpus in GPUS),
        ]
    )


def main() -> None:
    """Print the table, or write it into the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="write the table into docs/scale.md")
    if not parser.parse_args().write:
        print(table())
        return
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{table()}\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
