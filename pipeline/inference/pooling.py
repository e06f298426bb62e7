"""How the states of a region's bases become rows of a table: means over all bases, the centre, or bins; or each state.

Positions are those of the forward strand, whichever strand is read. States come block by block, so sums of bins that a
block's border cuts are kept until the next block. Sums are fp64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megabase.pipeline.errors import UserError

MEAN, LAST, CENTER, BIN, NONE = "mean", "last", "center", "bin", "none"


@dataclass(frozen=True)
class Pool:
    """What `--pool` asks for: its kind, and the number of bases of `center:N` and `bin:N`."""

    kind: str
    size: int = 0

    @classmethod
    def parse(cls, text: str) -> Pool:
        """Raises UserError if the text is none of mean, last, center:N, bin:N, none."""
        kind, colon, size = text.partition(":")
        if not colon and kind in (MEAN, LAST, NONE):
            return cls(kind)
        if kind in (CENTER, BIN) and size.isascii() and size.isdigit() and int(size):
            return cls(kind, int(size))
        raise UserError(f"--pool {text}: give mean, last, center:N, bin:N (N bases, at least 1) or none")

    def step(self, length: int) -> int:
        """Bases from the start of a row to that of the next one, in a region of `length` bases."""
        return {BIN: self.size, NONE: 1}.get(self.kind, length)

    def rows(self, length: int) -> int:
        """Rows of a region of `length` bases."""
        return -(-length // self.step(length))

    def check(self, region: str, length: int) -> None:
        """Raise UserError if a region of `length` bases is shorter than the centre."""
        if self.kind == CENTER and self.size > length:
            raise UserError(
                f"--pool {CENTER}:{self.size}: {region} has only {length} bases: take a smaller centre, or longer "
                "regions"
            )

    def part(self, length: int, *, reverse: bool) -> Part:
        """The positions of a region of `length` bases that the pool takes, on a strand."""
        if self.kind == CENTER:
            start = (length - self.size) // 2
            return Part(start, start + self.size, self.size)
        if self.kind == LAST:
            last = 0 if reverse else length - 1
            return Part(last, last + 1, 1, every=True)
        return Part(0, length, self.step(length), every=self.kind == NONE)


@dataclass(frozen=True)
class Part:
    """Positions [start, end), in bins of `size`, the last of which may be shorter.

    every: whether a state counts also where there is no letter (N).
    """

    start: int
    end: int
    size: int
    every: bool = False


@dataclass
class OpenBin:
    """A bin of which not all positions came yet: sum of states, counted states, letters, and positions that came."""

    total: Tensor
    counted: int = 0
    letters: int = 0
    seen: int = 0


@dataclass
class Pooling:
    """Collects the states of one region, in blocks from its first position to its last or the other way round.

    Attributes:
        part: the positions that count.
        write: called with the number of a bin, the means (bins, width) fp64 of it and those that follow, NaN where no
            state counts, and their letters (bins,).
    """

    part: Part
    write: Callable[[int, Tensor, Tensor], None]
    _open: dict[int, OpenBin] = field(default_factory=dict)

    def add(self, position: int, states: Tensor, letter: Tensor) -> None:
        """Take a block.

        Args:
            position: of its first state.
            states: (n, width), in the order of the positions.
            letter: (n,) bool, whether the base is a letter.
        """
        part = self.part
        begin, end = max(position, part.start), min(position + len(states), part.end)
        if begin >= end:
            return
        states, letter = states[begin - position : end - position], letter[begin - position : end - position]
        counted = torch.ones_like(letter) if part.every else letter
        states = states.where(counted[:, None], 0.0)  # also where a state is not finite
        begin, end = begin - part.start, end - part.start
        first = min(end, -(-begin // part.size) * part.size)  # the first border of bins
        last = max(first, end // part.size * part.size)
        for start, stop in ((begin, first), (last, end)):
            if start < stop:
                of = slice(start - begin, stop - begin)
                self._add_to_open(start // part.size, states[of], counted[of], letter[of])
        if first < last:
            of = slice(first - begin, last - begin)
            totals = states[of].unflatten(0, (-1, part.size)).sum(dim=1, dtype=torch.float64)
            counts, letters = (x[of].unflatten(0, (-1, part.size)).sum(dim=1) for x in (counted, letter))
            self.write(first // part.size, totals / counts[:, None], letters)

    def _add_to_open(self, number: int, states: Tensor, counted: Tensor, letter: Tensor) -> None:
        total = states.sum(dim=0, dtype=torch.float64)
        of = self._open.setdefault(number, OpenBin(torch.zeros_like(total)))
        of.total += total
        of.counted += int(counted.sum())
        of.letters += int(letter.sum())
        of.seen += len(states)
        length = min(self.part.size, self.part.end - self.part.start - number * self.part.size)
        if of.seen == length:
            del self._open[number]
            means = of.total / (of.counted or torch.nan)
            self.write(number, means[None], torch.tensor([of.letters]))
