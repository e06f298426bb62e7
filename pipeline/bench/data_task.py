"""The work of `megabase bench data`: reading records once, or resuming in the middle of them.

A call reads all records of a length once with a new loader, or makes a loader, puts it at the middle of the epoch and
ends with the first batch. Reading is in this process, from files that the operating system keeps in memory. The bases
that a contestant hands over are counted: it must hand over all of them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megabase.pipeline.bench.contest import Call, LeftOut, Probe, Reason
from megabase.pipeline.bench.lab import reasons
from megabase.pipeline.bench.readers import CONTESTANTS, Records

LENGTH, RESUME = "length", "resume"

BATCH_TOKENS = 128 << 10
"""The least number of tokens of a batch, which decides how many sequences it has."""


@dataclass(frozen=True)
class DataTask:
    """The work of a call, without the contestant and the length.

    Attributes:
        folder: directory of the records.
        bases: number of bases in the records of every length, about.
        along: LENGTH to read all records, RESUME to read the first batch in the middle of them.
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
        """The call to measure at sequence length `size`; it returns the loader that it read from. Raises LeftOut."""
        records, open_at = self.records(size), CONTESTANTS[name].open
        if self.along == RESUME:
            middle, batch = records.count // 2, records.micro_batch * size
            return lambda: read(open_at(records, middle), batch)
        opened = open_at(records, 0)
        return lambda: read(opened, records.bases)


def read(opened: Iterator[int], bases: int) -> Iterator[int]:
    """Read `bases` bases from a loader and return the loader. Raises LeftOut if it yields another number of them."""
    taken = 0
    for handed_over in opened:
        taken += handed_over
        if taken >= bases:
            break
    if taken != bases:
        raise LeftOut(Reason(f"failed: handed over {taken:,} bases instead of {bases:,}", failed=True))
    return opened


class ReadingLab:
    """Runs calls in this process. Memory is not measured, because most of it is the operating system's file cache."""

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
            del opened  # closing a loader may take long and is not timed
            return seconds
