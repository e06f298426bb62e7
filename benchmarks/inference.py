"""What it costs to score sequences and variants on one CPU core, with a model of random weights.

    python -m benchmarks.inference [--config configs/demo.yaml] [--lengths 10k 100k 1M 4M] [--variants 32] [--json FILE]

It reads E. coli from examples/data, and prints two tables.
- score: one strand of a record of each length, in a process of its own. peak: memory of the process beyond that before
  it read the first base.
- variants: SNVs after `--position` bases of a walk, on one strand, with 1,024 bases scored after each. fork: one SNV,
  read from a fork of the walk's state. near: one of 16 within 256 bases, whose forks are read together. context: one
  with `--context N`, given N bases of its own. windows: what others do, a forward pass over a window of N bases with
  REF and one with ALT, as two rows of a batch.
Times are CPU seconds of the process, so that other work on the machine disturbs them less; wall time is in the JSON.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.blocks import genome as tokens_of_genome
from benchmarks.blocks import number
from megabase.datamodules.alphabet import FIRST_LETTER, Alphabet
from megabase.models import Reformer, ReformerConfig, Seeds
from megabase.models.generation import read_block, start
from megabase.pipeline.bench.result import machine, versions
from megabase.pipeline.config.load import load
from megabase.pipeline.inference.genome import Genome
from megabase.pipeline.inference.variants.edits import Edit, Strand
from megabase.pipeline.inference.variants.reading import Reader, Row, read_rows
from megabase.pipeline.inference.variants.windows import windows

BLOCK = 1 << 14
LENGTHS = (10_000, 100_000, 1_000_000, 4_000_000)


@dataclass(frozen=True)
class Cost:
    """What was measured: `count` bases or variants took so many seconds; bytes: of peak memory."""

    what: str
    count: int
    cpu_seconds: float
    wall_seconds: float
    bytes: int | None = None

    @property
    def each(self) -> float:
        """CPU seconds of one."""
        return self.cpu_seconds / self.count


def model_of(config: Path) -> tuple[Reformer, ReformerConfig]:
    """The model of a config, with random weights."""
    run = load([config], ["run.name=benchmark", "data.shards=none"])
    run.model.vocab_size, run.model.max_length = Alphabet.named("dna").vocab_size, run.data.length
    torch.manual_seed(0)
    return Reformer(run.model).eval(), run.model


def timed(run: Callable[[], object]) -> tuple[float, float]:
    """CPU and wall seconds."""
    cpu, wall = time.process_time(), time.perf_counter()
    run()
    return time.process_time() - cpu, time.perf_counter() - wall


def score(config: Path, length: int) -> Cost:
    """Read one strand of `length` bases, in this process."""
    model, _ = model_of(config)
    tokens = tokens_of_genome(length)
    read_block(model, tokens[:, :256], start(model, 1))  # loads the kernels
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins again here
    before, state = peak(), start(model, 1)

    def read() -> None:
        for piece in tokens.split(BLOCK, dim=1):
            read_block(model, piece, state)

    return Cost("score", length, *timed(read), bytes=peak() - before)


def peak() -> int:
    """Most memory of this process, in bytes."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0])


def scores(config: Path, lengths: list[int]) -> list[Cost]:
    """Score each length in a new process."""
    rows = []
    for length in lengths:
        command = [
            sys.executable,
            "-m",
            "benchmarks.inference",
            "--config",
            str(config),
            "--one",
            str(length),
        ]
        found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        rows.append(Cost(**json.loads(found)))
        print(f"| {length:,} | {1 / rows[-1].each:,.0f} | {(rows[-1].bytes or 0) / 2**20:,.0f} |", flush=True)
    return rows


def variants(config: Path, position: int, count: int, context: int, folder: Path) -> list[Cost]:
    """The cost of SNVs in several ways."""
    model, _ = model_of(config)
    dna = Alphabet.named("dna")
    fasta = folder / "genome.fa"
    fasta.write_bytes(b">ecoli\n" + dna.decode(tokens_of_genome(position + context)[0].numpy()) + b"\n")
    strand = Strand(Genome(fasta), "ecoli", dna, reverse=False)
    reader, rows = Reader(model, Seeds()), []

    def add(what: str, number: int, seconds: tuple[float, float]) -> None:
        rows.append(Cost(what, number, *seconds))
        print(f"| {what} | {rows[-1].each * 1e3:,.4f} |", flush=True)

    def row(place: int, change: int) -> Row:
        """What a fork reads of an SNV at a place, from a walk that stands at `position`."""
        allele = (strand.tokens(place, place + 1) - FIRST_LETTER + change) % 4 + FIRST_LETTER
        after = strand.tokens(place + 1, place + 1 + reader.downstream)
        return Row(0, strand.tokens(position, place), allele, after)

    state = reader.start(1)
    reads = [strand.tokens(start, min(start + BLOCK, position)) for start in range(0, position, BLOCK)]
    add("a base of the walk", position, timed(lambda: [reader.read(piece[None], state) for piece in reads]))
    alone = [row(position, 1 + number % 3) for number in range(count)]
    add("fork", count, timed(lambda: [read_rows(reader, state, [one]) for one in alone]))
    near = [row(position + 16 * number, 1) for number in range(16)]
    add("near", len(near), timed(lambda: read_rows(reader, state, near)))
    edits = [Edit("ecoli", place, place + 1, b"N") for place in range(position, position + 400, 50)]
    add(f"context of {context:,}", len(edits), timed(lambda: windows(reader, strand, edits, context, ignore)))
    window = tokens_of_genome(context).expand(2, -1)
    with torch.no_grad():
        model(window)
        add(f"windows of {context:,}", 3, timed(lambda: [model(window) for _ in range(3)]))
    return rows


def ignore(_: int) -> None:
    """Show no progress."""


def main() -> None:
    """Measure and print both tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=Path("configs/demo.yaml"), help="the model's settings")
    parser.add_argument("--lengths", type=number, nargs="*", default=list(LENGTHS), help="records to score")
    parser.add_argument("--position", type=number, default=300_000, help="bases before the first variant")
    parser.add_argument("--variants", type=int, default=32, help="how many")
    parser.add_argument("--context", type=number, default=8192, help="bases of a window")
    parser.add_argument("--json", type=Path, help="also write the rows, with machine and versions")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.one:
        print(json.dumps(asdict(score(options.config, options.one))))
        return
    print("| bases | bases/s | peak, MiB |\n|---|---|---|")
    rows = scores(options.config, options.lengths)
    print("\n| | milliseconds |\n|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        found = variants(options.config, options.position, options.variants, options.context, Path(folder))
    each = {row.what.split(" of ")[0]: row.each for row in found}
    print(f"\nwindows / fork: {each['windows'] / each['fork']:.1f}")
    if options.json:
        lengths = " ".join(map(str, options.lengths))
        described = {
            "config": asdict(model_of(options.config)[1]),
            "rows": [asdict(row) for row in [*rows, *found]],
            "machine": machine("cpu"),
            "versions": versions(),
            "command": f"python -m benchmarks.inference --config {options.config} --lengths {lengths}",
        }
        options.json.write_text(json.dumps(described, indent=1) + "\n")


if __name__ == "__main__":
    main()
