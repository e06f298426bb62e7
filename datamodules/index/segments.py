"""Which part of which record belongs to which split, and where its bases lie: the index as numpy columns.

Planning windows needs these columns only, never the bases. A segment is a contiguous part of a record in one split.
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megabase.datamodules.index.lines import byte_of

TRAIN, VALID, TEST = "train", "valid", "test"


class Segment(NamedTuple):
    """A contiguous part of a record that belongs to one split.

    Attributes:
        split: name of the split.
        start: first base, counted in the record.
        length: bases.
        intervals: (start, length) of the BED intervals in it, relative to `start`; () without a BED file.
    """

    split: str
    start: int
    length: int
    intervals: tuple[tuple[int, int], ...] = ()


class Part(NamedTuple):
    """Bases [start, start + length) of a row of the index."""

    row: int
    start: int
    length: int


@dataclass(frozen=True, eq=False)
class Segments:
    """The index as columns, one entry per row, that is per segment.

    Three columns hold a list per row. Their elements lie in one array, row by row: the gaps of row i are
    `gaps[gap_bounds[i] : gap_bounds[i + 1]]`, and likewise blocks and intervals.

    Attributes:
        record, source, split, shard: names of the record, its input file, the split and the tar; object arrays of str.
        start, length: first base in the record, and bases; int64.
        offset: byte in the shard of the segment's first base; int64.
        line_bases, line_bytes: bases per line, and bytes per line with its line end, where the bases are stored in
            lines (FASTA members); else both 0. int64.
        crc32: checksum of the segment's bases; uint32.
        gaps: (total, 2) int64 [start, length] of the runs of bases that are not letters, relative to the segment.
        blocks: (total,) uint32 checksums of every `BLOCK_BYTES` bases.
        intervals: (total, 2) int64 [start, length] of BED intervals; a row without any is used from end to end.
        gap_bounds, block_bounds, interval_bounds: (rows + 1,) int64.
    """

    record: NDArray[np.object_]
    source: NDArray[np.object_]
    split: NDArray[np.object_]
    start: NDArray[np.int64]
    length: NDArray[np.int64]
    shard: NDArray[np.object_]
    offset: NDArray[np.int64]
    line_bases: NDArray[np.int64]
    line_bytes: NDArray[np.int64]
    crc32: NDArray[np.uint32]
    blocks: NDArray[np.uint32]
    block_bounds: NDArray[np.int64]
    gaps: NDArray[np.int64]
    gap_bounds: NDArray[np.int64]
    intervals: NDArray[np.int64]
    interval_bounds: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.record)

    def rows_of(self, split: str) -> NDArray[np.int64]:
        """Row numbers of a split, in order."""
        return np.flatnonzero(self.split == split)

    def splits(self) -> list[str]:
        """The splits that have a row, sorted."""
        return sorted(set(self.split))

    @cached_property
    def letters(self) -> NDArray[np.int64]:
        """(rows,) bases of each row that are letters of the alphabet."""
        missing = np.concatenate([[0], np.cumsum(self.gaps[:, 1])])
        letters: NDArray[np.int64] = self.length - (
            missing[self.gap_bounds[1:]] - missing[self.gap_bounds[:-1]]
        )
        return letters

    def letters_of(self, split: str) -> int:
        """Bases of a split that are letters of the alphabet."""
        return int(self.letters[self.rows_of(split)].sum())

    def byte_of(self, rows: NDArray[np.int64], bases: NDArray[np.int64]) -> NDArray[np.int64]:
        """The byte of the shard where a base lies.

        Args:
            rows: (n,) rows.
            bases: (n,) number of a base in each row's segment.
        """
        line_bases, line_bytes = self.line_bases[rows], self.line_bytes[rows]
        column = np.where(line_bases > 0, self.start[rows] % np.maximum(line_bases, 1), 0)
        first, wanted = (
            byte_of(column, line_bases, line_bytes),
            byte_of(column + bases, line_bases, line_bytes),
        )
        found: NDArray[np.int64] = self.offset[rows] + wanted - first
        return found

    @cached_property
    def identity(self) -> str:
        """A checksum of what decides the order of training: records, splits, lengths, gaps, bases and intervals.

        It is the same for shards of the same input, wherever they lie and however they are cut into files. Runs
        store it, so the same input must give the same value in every version of megabase.
        """
        digest = hashlib.sha256()
        for names in (self.record, self.split):
            digest.update("\0".join(names).encode() + b"\n")
        numbers = [self.start, self.length, self.crc32, self.gaps, self.gap_bounds]
        if len(self.intervals):
            numbers += [self.intervals, self.interval_bounds]
        for column in numbers:
            digest.update(np.ascontiguousarray(column).tobytes())
        return digest.hexdigest()[:16]
