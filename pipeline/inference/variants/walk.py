"""Score edits along one walk over a strand, from its first base to the last one that an edit needs.

The walk reads the reference in blocks and forks its state before each group of edits. A fork reads only what an edit
puts in, and the bases that follow. What the reference has there is scored by the walk itself, which reads it anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megabase.pipeline.inference.variants.edits import Edit, Placed, Strand
from megabase.pipeline.inference.variants.reading import TERMS, Reader, Row, Scored, read_rows


def walk(
    reader: Reader, strand: Strand, edits: Sequence[Edit], advance: Callable[[int], None]
) -> NDArray[np.void]:
    """Score edits of one record, in any order.

    Args:
        reader: the model, and how much is read at a time.
        strand: the strand to read, the record of all edits.
        edits: each one alone in the reference.
        advance: is called with numbers of tokens, as the walk goes on; their sum is `walk_size`.

    Returns:
        (edits,) of TERMS.

    Raises:
        RunError: a log-probability is not finite.
    """
    going = _Walk(reader, strand, np.zeros(len(edits), TERMS), advance)
    placed = [strand.place(number, edit) for number, edit in enumerate(edits)]
    for group in groups(placed, reader.spread):
        going.to(group[0].start)
        going.fork(group)
    if placed:
        going.to(max(going.window_end(edit) for edit in placed))
    return going.terms


def groups(edits: Sequence[Placed], spread: int) -> Iterator[list[Placed]]:
    """Edits in the order of their starts; those that start less than `spread` after the first of a group join it."""
    group: list[Placed] = []
    for edit in sorted(edits, key=lambda edit: (edit.start, edit.end, edit.number)):
        if group and edit.start >= group[0].start + max(1, spread):
            yield group
            group = []
        group.append(edit)
    if group:
        yield group


def walk_size(strand: Strand, edits: Sequence[Edit], downstream: int) -> int:
    """How many tokens `walk` reads, without those that a fork reads again."""
    size = last = 0
    for edit in (strand.place(0, edit) for edit in edits):
        end = min(edit.end + downstream, len(strand))
        size, last = size + len(edit.tokens) + end - edit.end, max(last, end)
    return size + last


@dataclass
class _Walk:
    """A walk under way. `waiting`: edits whose reference is not read to its end yet."""

    reader: Reader
    strand: Strand
    terms: NDArray[np.void]
    advance: Callable[[int], None]

    def __post_init__(self) -> None:
        self.position, self.state = 0, self.reader.start(1)
        self.waiting: list[Placed] = []

    def window_end(self, edit: Placed) -> int:
        """Where the bases that are scored after an edit end."""
        return min(edit.end + self.reader.downstream, len(self.strand))

    def to(self, position: int) -> None:
        """Read the reference up to `position`, and add it up for the edits that wait for it."""
        while self.position < position:
            first, last = self.position, min(self.position + self.reader.block, position)
            tokens = self.strand.tokens(first, last)
            scored = Scored(self.reader.read(tokens[None], self.state)[0], tokens)
            for edit in self.waiting:
                self._add(edit, "reference", scored, first, last, (edit.start, edit.end))
                downstream = (edit.end, self.window_end(edit))
                self._add(edit, "reference_downstream", scored, first, last, downstream)
            self.waiting = [edit for edit in self.waiting if self.window_end(edit) > last]
            self.position = last
            self.advance(last - first)

    def fork(self, group: Sequence[Placed]) -> None:
        """Read what the edits put in, and what follows. The walk stands where the first of them starts."""
        rows = [
            Row(
                0,
                self.strand.tokens(self.position, edit.start),
                edit.tokens,
                self.strand.tokens(edit.end, self.window_end(edit)),
            )
            for edit in group
        ]
        for edit, (allele, after) in zip(group, read_rows(self.reader, self.state, rows), strict=True):
            terms = self.terms[edit.number]
            terms["alternate"], terms["alternate_bases"] = allele.nats, allele.bases
            terms["alternate_downstream"], terms["downstream_bases"] = after.nats, after.bases
        self.waiting += [edit for edit in group if self.window_end(edit) > edit.start]
        self.advance(sum(len(row) - len(row.before) for row in rows))

    def _add(
        self, edit: Placed, name: str, scored: Scored, first: int, last: int, span: tuple[int, int]
    ) -> None:
        """Add what [first, last) has of a span."""
        start, end = max(first, span[0]), min(last, span[1])
        if start >= end:
            return
        sums = scored.between(start - first, end - first)
        self.terms[name][edit.number] += sums.nats
        if name == "reference":
            self.terms["reference_bases"][edit.number] += sums.bases
