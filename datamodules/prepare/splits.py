"""Which part of a record is for training, which for validation, which for the test.

A split is either a fraction, taken from the end of every record (train | valid | test in that order), or a
list of records that belong to it whole. A record that a list names is not cut by the other split's fraction.

Or a BED file says which intervals of a record belong to which split. The record is then cut into territories:
between neighbouring intervals of different splits at the middle of the gap between them. Windows widened to
any length inside their own territory can never see a base of another split.
"""

from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

from megabase.datamodules.errors import DataError
from megabase.datamodules.index.segments import TEST, TRAIN, VALID, Segment

_SPLIT_NAMES = {TRAIN: TRAIN, VALID: VALID, "val": VALID, "validation": VALID, TEST: TEST}
_BED_COLUMNS = 4
_BED_DISPLAY_LINES = ("track", "browser")


class Interval(NamedTuple):
    """Bases [start, end) of a record, from line `line` of the BED file."""

    start: int
    end: int
    split: str
    line: int


@dataclass(frozen=True)
class Bed:
    """A BED file read: the intervals of every record, by start; those of different splits do not overlap."""

    path: Path
    intervals: dict[str, list[Interval]]

    @classmethod
    def read(cls, path: Path) -> "Bed":
        """Read lines of chr, start, end, split (train, valid or test) separated by tabs, without a header.

        Further columns, empty lines, comments and display lines mean nothing.

        Raises DataError, naming file and line, for what is no such line and for intervals of different
        splits that overlap.
        """
        intervals: dict[str, list[Interval]] = {}
        for number, line in enumerate(_lines(path), 1):
            if line.strip() and not line.startswith("#") and line.split()[0] not in _BED_DISPLAY_LINES:
                name, interval = _interval(path, number, line)
                intervals.setdefault(name, []).append(interval)
        if not intervals:
            raise DataError(f"{path}: holds no interval: every line must be chr, start, end, split")
        for name, of_record in intervals.items():
            of_record.sort()
            _check_overlaps(path, name, of_record)
        return cls(path, intervals)

    def territories(self, name: str, length: int) -> list[Segment]:
        """The territories of a record of `length` bases, from its first base to its last; none without
        intervals. Raises DataError for an interval beyond the record's end."""
        runs = list(_runs(self.intervals.get(name, [])))
        segments, start = [], 0
        for run, behind in zip_longest(runs, runs[1:]):
            last = max(run, key=lambda interval: interval.end)
            if last.end > length:
                raise DataError(
                    f"{self.path}: line {last.line}: [{last.start}, {last.end}) reaches beyond record {name!r} of "
                    f"{length} bases: the intervals must be for this very assembly"
                )
            end = (last.end + behind[0].start) // 2 if behind else length
            inside = tuple((interval.start - start, interval.end - interval.start) for interval in run)
            segments.append(Segment(last.split, start, end - start, inside))
            start = end
        return segments


@dataclass(frozen=True)
class Splits:
    """The rule: `fractions` of every record by split, and the split of every record named `whole`; or a `bed`."""

    fractions: dict[str, float]
    whole: dict[str, str]
    bed: Bed | None = None

    @classmethod
    def parse(
        cls,
        valid: str | float | None = None,
        test: str | float | None = None,
        intervals: str | Path | None = None,
    ) -> "Splits":
        """Each of `valid` and `test` is a fraction in (0, 1), comma separated record names, or None for none.

        A text that is a number outside (0, 1) is a name: chromosomes are called "1" and "22".
        intervals: a BED file (see `Bed.read`), in place of the two.

        Raises DataError when the fractions leave nothing to train on, a name is in both, a list is empty,
        intervals are given beside one of the two, and as `Bed.read`.
        """
        if intervals is not None:
            if valid is not None or test is not None:
                raise DataError(
                    f"--intervals {intervals} with --valid or --test: the BED file says it all, take one of them"
                )
            return cls({}, {}, Bed.read(Path(intervals)))
        fractions: dict[str, float] = {}
        whole: dict[str, str] = {}
        for split, value in ((VALID, valid), (TEST, test)):
            if value is None:
                continue
            fraction = _fraction(value)
            if fraction is not None:
                fractions[split] = fraction
                continue
            for name in _names(split, value):
                if whole.setdefault(name, split) != split:
                    raise DataError(f"record {name!r} is in both --valid and --test: name it in one of them")
        if sum(fractions.values()) >= 1:
            raise DataError(
                f"--valid {valid} and --test {test} leave nothing to train on: their sum must be below 1"
            )
        return cls(fractions, whole)

    @property
    def named(self) -> Set[str]:
        """The records that the rule names: all of them must be met."""
        return self.bed.intervals.keys() if self.bed else self.whole.keys()

    def of(self, name: str, length: int) -> list[Segment]:
        """The segments of a record of `length` bases, in order and without the empty ones.

        A fraction x takes round(x * length) bases. Raises as `Bed.territories`.
        """
        if self.bed:
            return self.bed.territories(name, length)
        if name in self.whole:
            segments = [Segment(self.whole[name], 0, length)]
        else:
            parts = {split: round(x * length) for split, x in self.fractions.items()}
            parts = {TRAIN: max(length - sum(parts.values()), 0), **parts}
            segments, start = [], 0
            for split, size in parts.items():
                segments.append(Segment(split, start, min(size, length - start)))
                start += segments[-1].length
        return [segment for segment in segments if segment.length]

    def check_names(self, met: Iterable[str]) -> None:
        """Raise DataError if a named record is not among those `met` in the input."""
        for name in sorted(self.named - set(met)):
            if self.bed:
                raise DataError(
                    f"{self.bed.path}: line {self.bed.intervals[name][0].line}: {name!r} is no record of the "
                    "input: name records by the first word of their FASTA header, and give all files at once"
                )
            raise DataError(
                f"--{self.whole[name]} {name!r} is neither a fraction between 0 and 1 nor a record of the "
                "input: use the first word of a FASTA header, or the name of a text file without .gz"
            )


def _fraction(value: str | float) -> float | None:
    """The fraction that `value` says, None if it says none."""
    try:
        number = float(value)
    except ValueError:
        return None
    return number if 0 < number < 1 else None


def _names(split: str, value: str | float) -> list[str]:
    names = [name.strip() for name in str(value).split(",") if name.strip()]
    if not names:
        raise DataError(
            f"--{split} {str(value)!r} names no record: give a fraction between 0 and 1 or record names"
        )
    return names


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text("utf-8").split("\n")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}): give --intervals a BED file") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: no text ({error}): give --intervals a BED file, uncompressed") from error


def _interval(path: Path, number: int, line: str) -> tuple[str, Interval]:
    """The record and the interval that a line names."""
    place = f"{path}: line {number}"
    columns = line.split("\t")
    if len(columns) < _BED_COLUMNS:
        raise DataError(f"{place}: {line!r} has not chr, start, end and split with tabs between them")
    name, first, last, split = (column.strip() for column in columns[:_BED_COLUMNS])
    start, end = _position(place, "start", first), _position(place, "end", last)
    if start >= end:
        raise DataError(f"{place}: [{start}, {end}) holds no base: start must be below end")
    if split not in _SPLIT_NAMES:
        raise DataError(f"{place}: unknown split {split!r}: choose one of {TRAIN}, {VALID}, {TEST}")
    return name, Interval(start, end, _SPLIT_NAMES[split], number)


def _position(place: str, what: str, text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise DataError(f"{place}: {what} {text!r} is no number of a base: it must be 0 or more")
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
