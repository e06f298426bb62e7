"""Reads a BED file that assigns intervals of records to splits, and cuts records by it.

A record is cut into territories: between neighbouring intervals of different splits, at the middle of the gap between
them. A window that is widened to any length within its own territory can never hold a base of another split.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

from megabase.datamodules.errors import DataError
from megabase.datamodules.index.segments import TEST, TRAIN, VALID, Segment

_SPLIT_NAMES = {TRAIN: TRAIN, VALID: VALID, "val": VALID, "validation": VALID, TEST: TEST}
_COLUMNS = 4
_DISPLAY_LINES = ("track", "browser")


class Interval(NamedTuple):
    """Bases [start, end) of a record, from line `line` of the BED file."""

    start: int
    end: int
    split: str
    line: int


@dataclass(frozen=True)
class Bed:
    """The intervals of a BED file.

    Attributes:
        path: the file.
        intervals: record -> its intervals, sorted by start. Those of different splits do not overlap.
    """

    path: Path
    intervals: dict[str, list[Interval]]

    @classmethod
    def read(cls, path: Path) -> "Bed":
        """Read lines of chr, start, end, split (train, valid or test), separated by tabs, without a header.

        Further columns, empty lines, comments and display lines are ignored.

        Raises:
            DataError: the file cannot be read, holds no interval, a line is not of that form, or intervals of different
                splits overlap. The message names file and line.
        """
        intervals: dict[str, list[Interval]] = {}
        for row in read_rows(path, "split", "--intervals"):
            if row.fourth not in _SPLIT_NAMES:
                raise DataError(
                    f"{path}: line {row.line}: unknown split {row.fourth!r}: choose one of {TRAIN}, {VALID}, {TEST}"
                )
            interval = Interval(row.start, row.end, _SPLIT_NAMES[row.fourth], row.line)
            intervals.setdefault(row.name, []).append(interval)
        if not intervals:
            raise DataError(f"{path}: holds no interval: every line must be chr, start, end, split")
        for name, of_record in intervals.items():
            of_record.sort()
            _check_overlaps(path, name, of_record)
        return cls(path, intervals)

    def territories(self, name: str, length: int) -> list[Segment]:
        """Cut a record of `length` bases into territories, from its first base to its last.

        Returns:
            The territories as segments; none for a record without intervals.

        Raises:
            DataError: an interval reaches beyond the record's end.
        """
        runs = list(_runs(self.intervals.get(name, [])))
        segments, start = [], 0
        for run, following in zip_longest(runs, runs[1:]):
            last = max(run, key=lambda interval: interval.end)
            if last.end > length:
                raise DataError(
                    f"{self.path}: line {last.line}: [{last.start}, {last.end}) reaches beyond record {name!r} of "
                    f"{length} bases: the intervals must be for this assembly of the genome"
                )
            end = (last.end + following[0].start) // 2 if following else length
            inside = tuple((interval.start - start, interval.end - interval.start) for interval in run)
            segments.append(Segment(last.split, start, end - start, inside))
            start = end
        return segments


class Row(NamedTuple):
    """A line of a BED file: bases [start, end) of the record `name`, and the text of the fourth column."""

    name: str
    start: int
    end: int
    fourth: str
    line: int


def read_rows(path: Path, fourth: str | None, option: str) -> Iterator[Row]:
    """The intervals of a BED file, without empty lines, comments, display lines and further columns.

    Args:
        path: the file.
        fourth: what the fourth column holds, for messages. None: three columns are enough.
        option: of the command line that names the file, for messages.

    Raises:
        DataError: the file cannot be read, or a line is not chr, start, end and a fourth column. The message names
            file and line.
    """
    for number, line in enumerate(_lines(path, option), 1):
        if line.strip() and not line.startswith("#") and line.split()[0] not in _DISPLAY_LINES:
            yield _row(path, number, line, fourth)


def _lines(path: Path, option: str) -> list[str]:
    try:
        return path.read_text("utf-8").split("\n")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}): give {option} a BED file") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not text ({error}): give {option} a BED file, uncompressed") from error


def _row(path: Path, number: int, line: str, fourth: str | None) -> Row:
    place = f"{path}: line {number}"
    columns = line.split("\t")
    if fourth is None:
        columns = [*columns[: _COLUMNS - 1], *([""] if len(columns) >= _COLUMNS - 1 else [])]
    if len(columns) < _COLUMNS:
        wanted = "chr, start and end" if fourth is None else f"chr, start, end and {fourth}"
        raise DataError(f"{place}: {line!r} is not {wanted} with tabs between them")
    name, first, last, text = (column.strip() for column in columns[:_COLUMNS])
    if number == 1 and first[:1].isalpha() and last[:1].isalpha():
        raise DataError(
            f"{place}: {line!r} is a header, and a BED file has none: remove it, or begin it with #"
        )
    start, end = _position(place, "start", first), _position(place, "end", last)
    if start >= end:
        raise DataError(
            f"{place}: [{start}, {end}) holds no base: BED counts from 0 and leaves out the base at the end, so one "
            f"base is [{start}, {start + 1}): correct the line or remove it"
        )
    return Row(name, start, end, text, number)


def _position(place: str, what: str, text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise DataError(f"{place}: {what} {text!r} is not a non-negative integer")
    return int(text)


def _runs(intervals: list[Interval]) -> Iterator[list[Interval]]:
    """The intervals, sorted by start, in runs of one split."""
    run: list[Interval] = []
    for interval in intervals:
        if run and interval.split != run[0].split:
            yield run
            run = []
        run.append(interval)
    if run:
        yield run


def _check_overlaps(path: Path, name: str, intervals: list[Interval]) -> None:
    """Raise DataError if two intervals of different splits, all sorted by start, share a base."""
    last: Interval | None = None
    for run in _runs(intervals):
        if last is not None and run[0].start < last.end:
            raise DataError(
                f"{path}: line {run[0].line}: {name} [{run[0].start}, {run[0].end}) {run[0].split} overlaps the "
                f"{last.split} interval [{last.start}, {last.end}) of line {last.line}: a base belongs to one split"
            )
        last = max(run, key=lambda interval: interval.end)
