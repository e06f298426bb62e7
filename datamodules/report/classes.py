"""Classes of bases from an annotation, such as coding and repeat: which bases of a window are in which class."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megabase.datamodules.errors import DataError
from megabase.datamodules.index.segments import Segments
from megabase.datamodules.order.ranges import united
from megabase.datamodules.order.windows import PACKED, WindowPlan
from megabase.datamodules.report.annotation import read_annotation

REST = "(none)"
"""The class of bases that are in no interval."""


@dataclass(frozen=True, eq=False)
class Classes:
    """The intervals of an annotation by class.

    Attributes:
        names: of the classes, sorted; REST comes last.
        intervals: (class, record) -> (n, 2) int64 [start, end), sorted and disjoint.
    """

    names: tuple[str, ...]
    intervals: dict[tuple[str, str], NDArray[np.int64]]

    @classmethod
    def read(cls, path: Path, segments: Segments, split: str) -> "Classes":
        """Read an annotation: the types of GFF features, or the fourth column of BED. A base may be in several classes.

        Args:
            path: the file.
            segments: the index whose records the intervals must name.
            split: of which intervals must hold a base.

        Raises:
            DataError: the file cannot be read, or a line is no interval; no interval is of a record of the index, or
                none touches the split. The message names the file.
        """
        found: dict[tuple[str, str], list[tuple[int, int]]] = {}
        for row in read_annotation(path, "--annotation"):
            found.setdefault((row.fourth, row.name), []).append((row.start, row.end))
        if not found:
            raise DataError(
                f"{path}: holds no interval: give GFF features, or lines of chr, start, end, class"
            )
        _check_records(path, sorted({record for _, record in found}), segments)
        names = sorted({name for name, _ in found})
        classes = cls((*names, REST), {key: united(np.array(spans)) for key, spans in found.items()})
        classes._check_split(path, segments, split)
        return classes

    def masks(self, record: str, start: int, length: int) -> NDArray[np.bool_]:
        """(classes, length) which of the bases [start, start + length) of a record are in each class."""
        masks = np.zeros((len(self.names), length), bool)
        for mask, name in zip(masks[:-1], self.names[:-1], strict=True):
            for first, last in self._spans(name, record, start, length):
                mask[max(first - start, 0) : last - start] = True
        masks[-1] = ~masks[:-1].any(axis=0)
        return masks

    def of_window(self, plan: WindowPlan, segments: Segments, sample: int) -> NDArray[np.bool_]:
        """(classes, length) which bases of a window are in each class; none where a packed window has no base.

        Args:
            plan: of the windows.
            segments: the index.
            sample: id of the window; -1, filler, has no base.
        """
        masks = np.zeros((len(self.names), plan.length), bool)
        for row, first, at, length in _pieces(plan, sample):
            start = int(segments.start[row]) + first
            masks[:, at : at + length] = self.masks(segments.record[row], start, length)
        return masks

    def _spans(self, name: str, record: str, start: int, length: int) -> list[list[int]]:
        """The intervals of a class that touch [start, start + length) of a record."""
        spans = self.intervals.get((name, record))
        if spans is None:
            return []
        first = np.searchsorted(spans[:, 1], start, side="right")
        after = np.searchsorted(spans[:, 0], start + length, side="left")
        touched: list[list[int]] = spans[first:after].tolist()
        return touched

    def _check_split(self, path: Path, segments: Segments, split: str) -> None:
        for row in segments.rows_of(split):
            start, length = int(segments.start[row]), int(segments.length[row])
            if any(self._spans(name, segments.record[row], start, length) for name in self.names[:-1]):
                return
        raise DataError(
            f"{path}: no interval holds a base of split {split!r}: give intervals of its part of the records, or"
            " choose another split"
        )


def _pieces(plan: WindowPlan, sample: int) -> Iterator[tuple[int, int, int, int]]:
    """(row, first base in its segment, position in the window, length) of the parts of a window."""
    if sample < 0:
        return
    rows, starts = plan.locate(np.array([sample]))
    row, start = int(rows[0]), int(starts[0])
    if row != PACKED:
        yield row, start, 0, plan.length
        return
    assert plan.tape is not None
    for piece in plan.tape.pieces(start):
        yield piece[0], piece[1], piece[2], piece[3]


def _check_records(path: Path, names: list[str], segments: Segments) -> None:
    """Raise DataError unless a record of the index has one of these names."""
    records = sorted(set(segments.record))
    if not set(names) & set(records):
        raise DataError(
            f"{path}: names {_some(names)}, but the shards hold {_some(records)}: use the names of the shards' records"
        )


def _some(names: list[str], shown: int = 3) -> str:
    return ", ".join(map(repr, names[:shown])) + (
        f" and {len(names) - shown:,} more" if len(names) > shown else ""
    )
