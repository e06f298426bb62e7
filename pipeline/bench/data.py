"""`megabase bench data`: how fast training batches are read, and how soon after resuming.

Records of random bases are made once for every length, and written in each contestant's format into a temporary
directory.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megabase.datamodules.config import DataConfig
from megabase.pipeline.bench import contest, draw, report
from megabase.pipeline.bench.contest import Budget
from megabase.pipeline.bench.data_task import LENGTH, RESUME, DataTask, ReadingLab
from megabase.pipeline.bench.files import Files
from megabase.pipeline.bench.options import lengths_of, names_of, positive
from megabase.pipeline.bench.readers import CONTESTANTS, PACKAGES, SHUFFLE_BUFFER
from megabase.pipeline.bench.result import Result
from megabase.pipeline.bench.units import memory
from megabase.pipeline.errors import UserError

COPIES = 4
"""The most copies of the records on the disk at a time: the shards, and FASTA or the formats of the peers."""


@dataclass(frozen=True)
class DataOptions:
    """The options of the command; None: the default. mebibytes: of records, for each length. directory: for them."""

    lengths: str
    contestants: str | None
    mebibytes: int
    directory: Path | None
    repeat: int
    seconds: float | None
    json: Path | None
    picture: Path | None


def run(options: DataOptions) -> int:
    """Measure reading and resuming, print the tables, and write the files that the options name.

    Returns:
        The exit code: 1 if a contestant of megabase failed, else 0.

    Raises:
        UserError: an option is wrong.
        DataError: a length that cannot be trained on.
    """
    lengths = lengths_of("--lengths", options.lengths)
    names = names_of("--contestants", options.contestants, CONTESTANTS, list(CONTESTANTS))
    for name in ("mebibytes", "repeat"):
        positive(f"--{name}", getattr(options, name))
    seconds = options.seconds if options.seconds is not None else 60.0
    positive("--seconds", seconds)
    directory = options.directory or Path(tempfile.gettempdir())
    bases = options.mebibytes << 20
    check_lengths(lengths, bases)
    check_space(directory, COPIES * bases * len(lengths))
    files = Files.of(options.json, options.picture)

    with tempfile.TemporaryDirectory(prefix="megabase-bench-", dir=directory) as folder:
        task = DataTask(Path(folder), bases)
        result = new_result(task, lengths, names, Budget(seconds, options.repeat))

        for along in (LENGTH, RESUME):
            taking_part = [CONTESTANTS[name] for name in names]
            entries = [each.entry for each in taking_part if along == LENGTH or each.resumes]
            lab = ReadingLab(replace(task, along=along))
            contest.hold(entries, lengths, lab, Budget(seconds, options.repeat), files.collect(result, along))
    report.data_tables(result)
    files.write_picture(result, draw.data)
    return result.exit_code()


def new_result(task: DataTask, lengths: Sequence[int], names: Sequence[str], budget: Budget) -> Result:
    """The result before anything has run."""
    records = {length: task.records(length) for length in lengths}
    settings = {
        "device": "cpu",
        "bases": task.bases,
        "records": {length: each.count for length, each in records.items()},
        "micro_batch": {length: each.micro_batch for length, each in records.items()},
        "workers": 0,
        "shuffle_buffer": SHUFFLE_BUFFER,
        "seconds": budget.seconds,
        "repeat": budget.repeats,
    }
    labels = {name: CONTESTANTS[name].entry.label for name in names}
    tokens = {length: each.bases for length, each in records.items()}
    return Result("data", settings, labels, tokens=tokens, packages=("torch", *PACKAGES, "numpy"))


def check_lengths(lengths: Sequence[int], bases: int) -> None:
    """Raise UserError if `bases` are less than two batches of a length, DataError for a length that cannot work."""
    for length in lengths:
        DataConfig(length=length).validate()
        records = DataTask(Path(), bases).records(length)
        if not records.count:
            need = -(-2 * records.micro_batch * length >> 20)
            raise UserError(
                f"--mebibytes {bases >> 20}: does not hold two batches of length {length:,}: take --mebibytes "
                f"{need} or more, or shorter --lengths"
            )


def check_space(directory: Path, bytes_needed: int) -> None:
    """Raise UserError unless `directory` is writable and has so many bytes free."""
    if not directory.is_dir():
        raise UserError(f"--directory {directory}: no such directory")
    if not os.access(directory, os.W_OK):
        raise UserError(f"--directory {directory}: cannot be written")
    free = shutil.disk_usage(directory).free
    if free < bytes_needed:
        raise UserError(
            f"--directory {directory}: {memory(free)} free, and records of every length take "
            f"{memory(bytes_needed)}: take fewer --mebibytes or --lengths, or another --directory"
        )
