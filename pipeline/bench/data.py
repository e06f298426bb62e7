"""`megabase bench data`: how fast training batches are read, and how soon after resuming.

Records of random bases are made once for every length, and written in each contestant's format into a temporary
directory. A call reads all of them once, with a loader made anew; reading is in this process, with what the
operating system keeps of the files in memory. Resuming: a call makes a loader, puts it at the middle of the epoch,
and ends with the first batch. What a contestant hands over is counted, and has to be everything.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megabase.datamodules.config import DataConfig
from megabase.pipeline.bench import contest, draw, report
from megabase.pipeline.bench.contest import Budget, LeftOut, Probe, Reason
from megabase.pipeline.bench.lab import Call, reasons
from megabase.pipeline.bench.options import lengths_of, names_of, positive
from megabase.pipeline.bench.readers import CONTESTANTS, PACKAGES, SHUFFLE_BUFFER, Records
from megabase.pipeline.errors import UserError

LENGTH, RESUME = "length", "resume"

BATCH_TOKENS = 128 << 10
"""Tokens of a batch, at least: as many sequences as that takes."""

COPIES = 4
"""Of the records on the disk at most, for every length: FASTA or the peers' formats beside the shards."""


@dataclass(frozen=True)
class DataTask:
    """The work: everything but the contestant and the length.

    folder: where records are. bases: about as many for every length. along: LENGTH for all of the records, RESUME for
    the first batch in the middle of them.
    """

    folder: Path
    bases: int
    along: str = LENGTH

    def records(self, length: int) -> Records:
        """The records of a length: a whole number of batches before their middle, and as many after it."""
        micro_batch = -(-BATCH_TOKENS // length)
        count = self.bases // (2 * micro_batch * length) * 2 * micro_batch
        return Records(self.folder / str(length), length, count, micro_batch)

    def prepare(self, name: str, size: int, seed: int) -> Call:
        """The call to measure, at sequence length `size`; it returns what it read from. Raises LeftOut."""
        records, open_at = self.records(size), CONTESTANTS[name].open
        if self.along == RESUME:
            middle, batch = records.count // 2, records.micro_batch * size
            return lambda: read(open_at(records, middle), batch)
        opened = open_at(records, 0)
        return lambda: read(opened, records.bases)


def read(opened: Iterator[int], bases: int) -> Iterator[int]:
    """Take so many bases from an opened loader, and return it. Raises LeftOut if it hands over another number."""
    taken = 0
    for handed_over in opened:
        taken += handed_over
        if taken >= bases:
            break
    if taken != bases:
        raise LeftOut(Reason(f"failed: handed over {taken:,} bases instead of {bases:,}", failed=True))
    return opened


class ReadingLab:
    """Calls in this process, whose memory is not measured: what is read stays in the operating system's cache."""

    def __init__(self, task: DataTask) -> None:
        self._task = task

    def free_bytes(self) -> None:
        return None

    def probe(self, name: str, size: int, limit_s: float) -> Probe:
        """The first call also makes the contestant's files, which is not timed."""
        return Probe(self.clock(name, size, seed=0), None)

    def clock(self, name: str, size: int, seed: int) -> float:
        with reasons():
            call = self._task.prepare(name, size, seed)
            start = time.perf_counter()
            opened = call()
            seconds = time.perf_counter() - start
            del opened  # closing a loader may take a while, too
            return seconds


@dataclass(frozen=True)
class DataOptions:
    """What was typed; None: the default. mebibytes: records of each length. directory: where they are made."""

    lengths: str
    contestants: str | None
    mebibytes: int
    directory: Path | None
    repeat: int
    seconds: float | None
    json: Path | None
    picture: Path | None


def run(options: DataOptions) -> int:
    """Hold the contests; print the tables, write what was asked for. Returns the exit code. Raises UserError, and
    DataError for a length that cannot be trained on."""
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
    files = report.Files.of(options.json, options.picture)

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


def new_result(task: DataTask, lengths: Sequence[int], names: Sequence[str], budget: Budget) -> report.Result:
    """The outcome before anything ran."""
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
    return report.Result("data", settings, labels, tokens=tokens, packages=("torch", *PACKAGES, "numpy"))


def check_lengths(lengths: Sequence[int], bases: int) -> None:
    """Raise UserError unless `bases` hold two batches of every length, DataError if none can be trained on."""
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
    """Raise UserError unless so many bytes can be written below `directory`."""
    if not directory.is_dir():
        raise UserError(f"--directory {directory}: no such directory")
    if not os.access(directory, os.W_OK):
        raise UserError(f"--directory {directory}: cannot be written")
    free = shutil.disk_usage(directory).free
    if free < bytes_needed:
        raise UserError(
            f"--directory {directory}: {report.memory(free)} free, and records of every length take "
            f"{report.memory(bytes_needed)}: take fewer --mebibytes or --lengths, or another --directory"
        )
