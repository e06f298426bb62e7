"""Decides which part of a record is for training, for validation and for the test.

A split is a fraction, taken from the end of every record (train, valid, test in that order), or a list of records that
belong to it from end to end, by name or pattern. A record in a list is not cut by the other split's fraction. Or a
fraction is of whole records, drawn by a hash of their bases, for reads, contigs and short documents. Or a BED file
assigns intervals to splits (see `bed`).
"""

import glob
import logging
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from hashlib import blake2b
from pathlib import Path

import numpy as np

from megabase.datamodules.alphabet import Alphabet
from megabase.datamodules.errors import DataError
from megabase.datamodules.index.segments import TEST, TRAIN, VALID, Segment
from megabase.datamodules.prepare.bed import Bed
from megabase.datamodules.prepare.closest import hint

log = logging.getLogger(__name__)

END, RECORD, SIMILARITY = "end", "record", "similarity"
"""What a fraction takes: the end of every record, whole records, or whole groups of similar records."""


@dataclass(frozen=True)
class Splits:
    """How records are split: by fractions and names, or by a BED file.

    Attributes:
        fractions: split -> fraction of every record.
        records: record, or pattern of records -> the split that they belong to from end to end.
        bed: used in place of the two, unless None.
        by: what a fraction takes, `END`, `RECORD` or `SIMILARITY`.
        patterns: those of `records` that are patterns.
    """

    fractions: dict[str, float]
    records: dict[str, str]
    bed: Bed | None = None
    by: str = END
    patterns: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        magic = {name: split for name, split in self.records.items() if glob.has_magic(name)}
        object.__setattr__(self, "patterns", magic)

    @classmethod
    def parse(
        cls,
        valid: str | float | None = None,
        test: str | float | None = None,
        intervals: str | Path | None = None,
        by: str = END,
    ) -> "Splits":
        """Read the options of `megabase prepare`.

        Args:
            valid, test: a fraction in (0, 1), comma separated record names and patterns (`*`, `?`, `[`), or None for no
                such split. A number outside (0, 1) is a name, since chromosomes have names like "1" and "22".
            intervals: a BED file (see `Bed.read`), in place of the two.
            by: what a fraction takes, `END`, `RECORD` or `SIMILARITY`.

        Raises:
            DataError: the fractions leave nothing to train on, a name is in both lists, a list is empty, intervals are
                given together with one of the two, there is no fraction to split by record, or names beside similarity,
                or as `Bed.read`.
        """
        if by not in (END, RECORD, SIMILARITY):
            raise DataError(f"--split-by {by}: choose one of {END}, {RECORD}, {SIMILARITY}")
        if intervals is not None:
            if valid is not None or test is not None:
                raise DataError(f"--intervals {intervals} with --valid or --test: give one of them, not both")
            if by != END:
                raise DataError(f"--intervals {intervals} with --split-by {by}: give one of them, not both")
            return cls({}, {}, Bed.read(Path(intervals)))
        fractions: dict[str, float] = {}
        records: dict[str, str] = {}
        for split, value in ((VALID, valid), (TEST, test)):
            if value is None:
                continue
            fraction = _fraction(value)
            if fraction is not None:
                fractions[split] = fraction
                continue
            for name in _names(split, value):
                if records.setdefault(name, split) != split:
                    raise DataError(f"record {name!r} is in both --valid and --test: name it in one of them")
        if sum(fractions.values()) >= 1:
            raise DataError(
                f"--valid {valid} and --test {test} leave nothing to train on: their sum must be below 1"
            )
        if by != END and not fractions:
            raise DataError(f"--split-by {by} needs a fraction: add --valid 0.1")
        if by == SIMILARITY and records:
            raise DataError(
                f"--split-by {by} with record {next(iter(records))!r}: it takes fractions only, since relatives of a "
                "named record could be in training"
            )
        return cls(fractions, records, by=by)

    @property
    def hold_out(self) -> bool:
        """Whether anything is for validation or test."""
        return bool(self.fractions or self.records or self.bed)

    @property
    def named(self) -> Set[str]:
        """The records and patterns of records that a list or the BED file names. All must exist in the input."""
        return self.bed.intervals.keys() if self.bed else self.records.keys()

    def of(self, name: str, length: int, drawn: Callable[[], float] = float) -> list[Segment]:
        """Cut a record into segments. By similarity, every record is for training until all of them are known.

        Args:
            name: name of the record.
            length: its bases. A fraction x of the end takes round(x * length) of them.
            drawn: returns a number in [0, 1), see `draw`; called if the record is drawn.

        Returns:
            The segments in order, without empty ones.

        Raises:
            DataError: an interval reaches beyond the record's end, or patterns of two splits match the name.
        """
        if self.bed:
            return self.bed.territories(name, length)
        if split := self._named(name):
            segments = [Segment(split, 0, length)]
        elif self.by == RECORD:
            segments = [Segment(self._drawn(drawn()), 0, length)]
        elif self.by == SIMILARITY:
            segments = [Segment(TRAIN, 0, length)]
        else:
            parts = {split: round(x * length) for split, x in self.fractions.items()}
            parts = {TRAIN: max(length - sum(parts.values()), 0), **parts}
            segments, start = [], 0
            for split, size in parts.items():
                segments.append(Segment(split, start, min(size, length - start)))
                start += segments[-1].length
        return [segment for segment in segments if segment.length]

    def check_names(self, found: Set[str], every: Callable[[], Sequence[str]]) -> None:
        """Check that every named record exists, and that every pattern matches one.

        Args:
            found: those of `named` that are names of records.
            every: returns the names of all records; called if that is not enough to know.

        Raises:
            DataError: one does not exist; the message has the closest name.
        """
        missing = sorted(self.named - found)
        names = every() if missing else []
        for name in missing:
            if any(fnmatchcase(other, name) for other in names if name in self.patterns):
                continue
            if self.bed:
                raise DataError(
                    f"{self.bed.path}: line {self.bed.intervals[name][0].line}: no record is named {name!r}"
                    f"{hint(name, names)}"
                )
            what = "matches" if name in self.patterns else "is named"
            number = ", and a fraction lies between 0 and 1" if _is_number(name) else ""
            raise DataError(f"--{self.records[name]}: no record {what} {name!r}{number}{hint(name, names)}")

    def _drawn(self, number: float) -> str:
        """The split of a record by its number in [0, 1)."""
        for split, fraction in self.fractions.items():
            if number < fraction:
                return split
            number -= fraction
        return TRAIN

    def _named(self, name: str) -> str:
        """The split whose list has a record, by its name or else by a pattern; empty if none has."""
        if name in self.records:
            return self.records[name]
        matching = {split: pattern for pattern, split in self.patterns.items() if fnmatchcase(name, pattern)}
        if len(matching) > 1:
            both = " and ".join(f"--{split} {pattern!r}" for split, pattern in matching.items())
            raise DataError(f"record {name!r} matches {both}: it can be in one of them only")
        return next(iter(matching), "")


def warn_of_shares(fractions: Mapping[str, float], sizes: Mapping[str, int], why: str) -> None:
    """Log for each split that its share of the bases is far from the fraction that was asked for.

    Args:
        fractions: split -> fraction.
        sizes: split -> bases.
        why: how that comes, for the message.
    """
    total = sum(sizes.values())
    for split, fraction in fractions.items():
        share = sizes[split] / total
        if not 0.5 < share / fraction < 2:
            log.warning("%s has %.1f%% of the bases, not %g%%: %s", split, 100 * share, 100 * fraction, why)


def draw(bases: bytes | memoryview, alphabet: Alphabet) -> float:
    """A number in [0, 1) for a record, from a hash of its bases, so that equal records are in one split.

    Neither case nor strand matters where the alphabet has them. A record that is added, removed or renamed does not
    change the numbers of the others.
    """
    content = bytes(bases)
    if alphabet.soft is not None:
        content = content.upper()
    if alphabet.complement is not None:
        content = min(content, alphabet.reverse_complement(np.frombuffer(content, np.uint8)).tobytes())
    return int.from_bytes(blake2b(content, digest_size=6).digest()) / (1 << 48)


def _fraction(value: str | float) -> float | None:
    """`value` as a fraction in (0, 1); None if it is something else."""
    try:
        number = float(value)
    except ValueError:
        return None
    return number if 0 < number < 1 else None


def _is_number(text: str) -> bool:
    """Whether it looks as if a fraction was meant, as in 10 or 10%."""
    try:
        float(text.removesuffix("%"))
    except ValueError:
        return False
    return True


def _names(split: str, value: str | float) -> list[str]:
    names = [name.strip() for name in str(value).split(",") if name.strip()]
    if not names:
        raise DataError(
            f"--{split} {str(value)!r} names no record: give a fraction between 0 and 1 or record names"
        )
    return names
