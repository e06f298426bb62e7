"""What a checkpoint costs a training, and what a resume costs: prints two tables.

    python benchmarks/checkpoint.py [--sizes 10M,50M,100M] [--ranks 2] [--directory DIR] [--json FILE]

Every run is a training in new processes (`checkpoint_run.py`; ZeRO-2, `--ranks` processes on this machine) of the same
model on the same windows. Only the way to save differs:

- `ours`, `ours, background`: `megabase train`, with `checkpoint.background` false and true;
- `Lightning`: `Trainer.save_checkpoint` of Lightning's DeepSpeedStrategy with DeepSpeed's own writer, then fsync of
  every file: without that, a checkpoint is in memory only;
- `DCP`, `DCP, async`: `torch.distributed.checkpoint.save` and `async_save` of the same states;
- `plain write`: the bytes of the same states to one file for each rank, and fsync: the lower bound, without a format or
  checksums.

stall: seconds for which one checkpoint held up the training loop, from the end of its step to the start of the next
(median of three). slowdown: wall time of the same steps with three checkpoints minus without, divided by three; it
includes the processor time that a background thread takes from training. written: from the start of a save until the
checkpoint is published. The resume reads files that are no longer in the page cache; ours compares every byte with its
checksum before it loads (`verify`), which no peer does.

The figures are valid only if nothing else runs on the machine.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from checkpoint_run import BACKGROUND, CONTESTANTS, OURS, PLAIN, RESUMED, SAVES, WARM_UP, Task, Times

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Row:
    """One line of the tables, in seconds and bytes. None: not measured for this contestant."""

    parameters: int
    contestant: str
    bytes: int
    step: float
    every: int
    stalls: list[float]
    slowdown: float
    written: list[float]
    verify: float | None = None
    load: float | None = None
    ready: float | None = None
    first_step: float | None = None


def main() -> None:
    """Run everything and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--sizes", default="10M,50M,100M", metavar="P,P", help="parameters (default: %(default)s)"
    )
    parser.add_argument("--ranks", type=int, default=2, metavar="N", help="processes (default: %(default)s)")
    parser.add_argument(
        "--contestants", default=";".join(CONTESTANTS), metavar="A;B", help="default: %(default)s"
    )
    parser.add_argument(
        "--directory", type=Path, metavar="DIR", help="on the disk to measure (default: a temporary one)"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="also write the rows, with the machine named"
    )
    options = parser.parse_args()
    contestants = options.contestants.split(";")
    if unknown := sorted(set(contestants) - set(CONTESTANTS)):
        parser.error(f"--contestants: {unknown[0]!r} is none of {', '.join(CONTESTANTS)}")
    try:
        sizes = [size_of(text) for text in options.sizes.split(",")]
    except ValueError:
        parser.error(f"--sizes {options.sizes!r}: give numbers such as 10M,500k")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(dir=options.directory, prefix="checkpoint-") as directory:
        shards = make_shards(Path(directory))
        for size in sizes:
            for row in measure(size, contestants, options.ranks, Path(directory), shards):
                rows.append(row)
                if options.json:
                    write_json(options.json, rows, options.ranks)
    print(tables(rows))


def write_json(path: Path, rows: list[Row], ranks: int) -> None:
    """Write the rows so far, with the machine named."""
    from megabase.pipeline.rundir import environment

    machine = environment.describe()
    machine["command"] = "python benchmarks/checkpoint.py"  # without paths of this machine
    described = {
        "rows": [asdict(row) for row in rows],
        "ranks": ranks,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": machine,
    }
    path.write_text(json.dumps(described, indent=1) + "\n")


def size_of(text: str) -> int:
    """'10M' -> 10,000,000."""
    units = {"k": 10**3, "M": 10**6, "G": 10**9}
    return int(float(text.rstrip("kMG")) * units.get(text[-1:], 1))


def make_shards(directory: Path) -> Path:
    """The genome of phage lambda, without a validation split."""
    from megabase.datamodules.prepare.run import prepare

    shards = directory / "shards"
    prepare([ROOT / "tests" / "data" / "lambda_phage.fna.gz"], shards, progress=False)
    return shards


def dim_for(parameters: int) -> tuple[int, int]:
    """(model.dim, its number of parameters): the multiple of 64 that comes closest."""
    counts = {dim: count_parameters(dim) for dim in range(64, 4097, 64)}
    dim = min(counts, key=lambda dim: abs(math.log(counts[dim] / parameters)))
    return dim, counts[dim]


def count_parameters(dim: int) -> int:
    """Parameters of the model of the runs."""
    import torch

    from megabase.models import Reformer
    from megabase.pipeline.config.load import load

    model = load([], Task(OURS, ".", ".", dim, 1, 1, 1).settings).model
    model.vocab_size = 9
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Reformer(model).parameters())


def measure(size: int, contestants: list[str], ranks: int, directory: Path, shards: Path) -> Iterator[Row]:
    """All rows of one size of model."""
    dim, parameters = dim_for(size)

    def run(contestant: str, every: int, steps: int, resume: bool = False) -> Times:
        place = directory / f"{dim}-{CONTESTANTS.index(contestant)}-{every}-{steps}"
        say(
            f"{parameters / 1e6:.0f}M parameters: {contestant}, {'resume' if resume else f'{steps} steps'}"
            f"{f', a checkpoint every {every}' if every and not resume else ''}"
        )
        return start(Task(contestant, str(place), str(shards), dim, ranks, steps, every, resume))

    # Checkpoints are far enough apart that one in the background is complete before the next begins.
    trial = run(OURS, 0, WARM_UP + 4)
    every = max(4, min(60, math.ceil(4 * (trial.begins[-1] - trial.ends[-1]) / trial.step())))
    steps = (SAVES + 1) * every
    without_saves = {ours: run(OURS if ours else PLAIN, 0, steps) for ours in (True, False)}
    for contestant in contestants:
        times = run(contestant, every, steps)
        without = without_saves[contestant in (OURS, BACKGROUND)]
        slowdown = (times.wall() - without.wall()) / SAVES
        row = Row(
            parameters,
            contestant,
            times.bytes,
            without.step(),
            every,
            times.stalls(every),
            slowdown,
            times.written,
        )
        if contestant in RESUMED:
            forget(Path(directory))
            again = run(contestant, every, steps, resume=True)
            row.verify = again.verify if contestant == OURS else None
            row.load, row.ready, row.first_step = again.load, again.ready, again.first_step
        yield row


def start(task: Task) -> Times:
    """Run a task in processes of its own."""
    from megabase.pipeline.ranks.stop import StopRequest
    from megabase.pipeline.ranks.supervisor import supervise

    task.started = time.time()
    command = [
        sys.executable,
        str(Path(__file__).with_name("checkpoint_run.py")),
        json.dumps(asdict(task)),
    ]
    if supervise(command, task.ranks, StopRequest(), hint=str) != 0:
        raise SystemExit(f"{task.contestant} failed; its message is above")
    return Times(**json.loads((Path(task.directory) / "times.json").read_text()))


def forget(directory: Path) -> None:
    """Drop the files of a directory from the page cache. Every contestant has synced them to disk."""
    for path in directory.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def say(text: str) -> None:
    print(f"checkpoint: {text}", file=sys.stderr, flush=True)


def tables(rows: list[Row]) -> str:
    """Both tables as Markdown."""
    lines = [
        "| parameters | checkpoint, MB | | step, s | stall, s | slowdown, s | written after, s | write, MB/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        written = statistics.median(row.written)
        lines.append(
            f"| {row.parameters / 1e6:.0f}M | {row.bytes / 1e6:,.0f} | {row.contestant} | {row.step:.2f}"
            f" | {statistics.median(row.stalls):.2f} | {row.slowdown:.2f} | {written:.2f}"
            f" | {row.bytes / 1e6 / written:,.0f} |"
        )
    lines += [
        "",
        "| parameters | | verify, s | load, s | read, MB/s | start to reading, s | start to first step, s |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row.load is not None:
            verify = "" if row.verify is None else f"{row.verify:.2f}"
            lines.append(
                f"| {row.parameters / 1e6:.0f}M | {row.contestant} | {verify} | {row.load:.2f}"
                f" | {row.bytes / 1e6 / ((row.verify or 0) + row.load):,.0f} | {row.ready:.1f}"
                f" | {row.first_step:.1f} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
