"""Counts what is in a shard set.

The numbers come from the index alone, so a description of a terabyte of shards reads only its index.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megabase.datamodules.errors import DataError
from megabase.datamodules.index.leakage import read_leakage
from megabase.datamodules.index.segments import TEST, TRAIN, VALID, Segments
from megabase.datamodules.index.shard_index import ShardIndex
from megabase.datamodules.report.lengths import count_windows

LENGTHS = {"1k": 1 << 10, "8k": 8 << 10, "32k": 32 << 10, "131k": 128 << 10, "1M": 1 << 20}
"""Context lengths that windows are counted for, by name."""


@dataclass(frozen=True)
class SplitReport:
    """One split.

    Attributes:
        split: its name.
        segments: parts of records that belong to it.
        bases: of all segments.
        letters: bases that are letters of the alphabet.
        leakage: fraction of its 31-mers that occur in training; None where `prepare` did not measure it.
        windows: by name of LENGTHS, the number of windows with default settings.
    """

    split: str
    segments: int
    bases: int
    letters: int
    leakage: float | None
    windows: dict[str, int]


@dataclass(frozen=True)
class RecordReport:
    """A record, and its bases up to the end of its last segment."""

    record: str
    bases: int


@dataclass(frozen=True)
class Description:
    """The contents of a shard set. Records without a base are in no split and not counted.

    Attributes:
        directory: path or URL of the shards.
        alphabet: what they were prepared for.
        records, shards: their numbers.
        bytes: of all shards.
        longest, shortest: records.
        splits: train, valid, test, then any other.
        sources: bases by input file.
    """

    directory: str
    alphabet: str
    records: int
    shards: int
    bytes: int
    longest: RecordReport
    shortest: RecordReport
    splits: list[SplitReport]
    sources: dict[str, int]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def describe(index: ShardIndex) -> Description:
    """Count what is in an opened shard set, without reading bases. Raises DataError for an index without rows."""
    segments = index.segments
    if not len(segments):
        raise DataError(f"{index.directory}: the index has no row: prepare the shards again")
    lengths = record_lengths(segments)
    leaks = {leak.split: leak.share for leak in read_leakage(index.store)}
    longest, shortest = max(lengths, key=lengths.__getitem__), min(lengths, key=lengths.__getitem__)
    return Description(
        directory=str(index.directory),
        alphabet=index.alphabet.name,
        records=len(lengths),
        shards=len(index.sizes),
        bytes=sum(index.sizes.values()),
        longest=RecordReport(longest, lengths[longest]),
        shortest=RecordReport(shortest, lengths[shortest]),
        splits=[_describe_split(segments, split, leaks.get(split)) for split in in_order(segments.splits())],
        sources=_sum_by(segments.source, segments.length),
    )


def _describe_split(segments: Segments, split: str, leakage: float | None) -> SplitReport:
    rows = segments.rows_of(split)
    bases = int(segments.length[rows].sum())
    return SplitReport(
        split=split,
        segments=len(rows),
        bases=bases,
        letters=segments.letters_of(split),
        leakage=leakage,
        windows={name: count_windows(segments, split, length) for name, length in LENGTHS.items()},
    )


def record_lengths(segments: Segments) -> dict[str, int]:
    """Bases of every record, up to the end of its last segment."""
    lengths: dict[str, int] = {}
    ends = (segments.start + segments.length).tolist()
    for record, end in zip(segments.record, ends, strict=True):
        lengths[record] = max(lengths.get(record, 0), end)
    return lengths


def _sum_by(names: NDArray[np.object_], numbers: NDArray[np.int64]) -> dict[str, int]:
    sums: dict[str, int] = {}
    for name, number in zip(names, numbers.tolist(), strict=True):
        sums[name] = sums.get(name, 0) + number
    return sums


def in_order(splits: list[str]) -> list[str]:
    """train, valid, test, then any other."""
    return sorted(splits, key=lambda split: ([TRAIN, VALID, TEST, split].index(split), split))
