"""Which part of a record is for training, which for validation, which for the test.

A split is either a fraction, taken from the end of every record (train | valid | test in that order), or a
list of records that belong to it whole. A record that a list names is not cut by the other split's fraction.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from datamodules.errors import DataError

TRAIN, VALID, TEST = "train", "valid", "test"


class Segment(NamedTuple):
    """A contiguous part of a record that lies in one split; start and length in bases."""

    split: str
    start: int
    length: int


@dataclass(frozen=True)
class Splits:
    """The rule: `fractions` of every record by split, and the split of every record named outright."""

    fractions: dict[str, float]
    named: dict[str, str]

    @classmethod
    def parse(cls, valid: str | float | None = None, test: str | float | None = None) -> "Splits":
        """Each of `valid` and `test` is a fraction in (0, 1), comma separated record names, or None for none.

        A text that is a number outside (0, 1) is a name: chromosomes are called "1" and "22".

        Raises DataError when the fractions leave nothing to train on, a name is in both, or a list is empty.
        """
        fractions: dict[str, float] = {}
        named: dict[str, str] = {}
        for split, value in ((VALID, valid), (TEST, test)):
            if value is None:
                continue
            fraction = _fraction(value)
            if fraction is not None:
                fractions[split] = fraction
                continue
            for name in _names(split, value):
                if named.setdefault(name, split) != split:
                    raise DataError(f"record {name!r} is in both --valid and --test: name it in one of them")
        if sum(fractions.values()) >= 1:
            raise DataError(
                f"--valid {valid} and --test {test} leave nothing to train on: their sum must be below 1"
            )
        return cls(fractions, named)

    def of(self, name: str, length: int) -> list[Segment]:
        """The segments of a record of `length` bases, in order and without the empty ones.

        A fraction x takes round(x * length) bases.
        """
        if name in self.named:
            segments = [Segment(self.named[name], 0, length)]
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
        for name in sorted(self.named.keys() - set(met)):
            raise DataError(
                f"--{self.named[name]} {name!r} is neither a fraction between 0 and 1 nor a record of the "
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
