"""What a variant changes: which bases of a record are replaced, and by which.

An edit has no bases that REF and ALT share at their ends: they are equally likely with and without the variant, if
they are read before it, and the same bases are then compared on both strands.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megabase.datamodules.alphabet import Alphabet
from megabase.pipeline.inference.genome import Genome


@dataclass(frozen=True)
class Edit:
    """Bases [start, end) of a record become `bases`. An insertion replaces no base, a deletion has no `bases`."""

    record: str
    start: int
    end: int
    bases: bytes

    @property
    def kind(self) -> str:
        """snv, mnv (as many bases for several), insertion, deletion, or indel (fewer or more bases for some)."""
        removed, added = self.end - self.start, len(self.bases)
        if removed == added:
            return "snv" if added == 1 else "mnv"
        return "insertion" if not removed else "indel" if added else "deletion"


def edit_of(record: str, start: int, reference: bytes, alternate: bytes) -> Edit:
    """The edit of a REF and an ALT that begin at `start`: what both have at their ends is cut off, on the right first.

    So an insertion or deletion in a repeat stays where a left-aligned VCF has it.
    """
    old, new = reference.upper(), alternate.upper()
    shortest = min(len(old), len(new))
    right = next((i for i in range(shortest) if old[-1 - i] != new[-1 - i]), shortest)
    left = next((i for i in range(shortest - right) if old[i] != new[i]), shortest - right)
    return Edit(record, start + left, start + len(old) - right, alternate[left : len(new) - right])


@dataclass(frozen=True)
class Placed:
    """An edit on a strand: positions [start, end) in reading order become `tokens`; `number` is the edit's."""

    number: int
    start: int
    end: int
    tokens: NDArray[np.integer]


@dataclass(frozen=True)
class Strand:
    """A record in the direction in which one of its strands is read."""

    genome: Genome
    record: str
    alphabet: Alphabet
    reverse: bool

    def __len__(self) -> int:
        return self.genome.lengths[self.record]

    def tokens(self, start: int, end: int) -> NDArray[np.integer]:
        """Tokens (end − start,) of positions in reading order."""
        if self.reverse:
            start, end = len(self) - end, len(self) - start
        return self._encoded(self.genome.fetch(self.record, start, end))

    def place(self, number: int, edit: Edit) -> Placed:
        """The edit in reading order."""
        start, end = (
            (len(self) - edit.end, len(self) - edit.start) if self.reverse else (edit.start, edit.end)
        )
        return Placed(number, start, end, self._encoded(np.frombuffer(edit.bases, np.uint8)))

    def _encoded(self, letters: NDArray[np.uint8]) -> NDArray[np.integer]:
        return self.alphabet.encode(self.alphabet.reverse_complement(letters) if self.reverse else letters)
