"""Which letters may come next, so that a generated sequence avoids motifs, ends at one, and keeps its share of G and C.

All motifs are read at once by an automaton: its state says how far each of them has been matched by the letters so
far, those of the prompt included. The states that can be reached are listed before anything is drawn, with how many
letters can still follow each. So a letter is masked if it completes a forbidden motif, and if every way on from it
would: the sequence never gets stuck.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megabase.datamodules.alphabet import Alphabet
from megabase.pipeline.errors import UserError

# Cornish-Bowden, Nucleic Acids Research 13 (1985), table 1.
IUPAC = {
    **{
        "A": "A",
        "C": "C",
        "G": "G",
        "T": "T",
        "R": "AG",
        "Y": "CT",
        "S": "CG",
        "W": "AT",
        "K": "GT",
        "M": "AC",
    },
    **{"B": "CGT", "D": "AGT", "H": "ACT", "V": "ACG", "N": "ACGT"},
}
MOST_STATES = 1 << 17
MOST_COUNTS = 1 << 27
"""Limits of the automaton's states, and of states · letters of a sequence for which counts of G and C are kept."""
ENDLESS = 1 << 60
"""Letters that can follow a state from which every length can be reached."""


@dataclass(frozen=True)
class Motif:
    """A motif: what the user wrote, and for each of its places the letters (by their number) that match."""

    text: str
    places: tuple[frozenset[int], ...]

    @classmethod
    def parse(cls, text: str, alphabet: Alphabet, option: str) -> Motif:
        """Read a motif; for dna with IUPAC codes, for protein with X for every residue. Case does not matter.

        Raises:
            UserError: it is empty, or a letter of it is unknown.
        """
        letters = alphabet.letters.decode("latin-1")
        codes = IUPAC if alphabet.name == "dna" else {**{x: x for x in letters}, "X": letters}
        unknown = [letter for letter in text.upper() if letter not in codes]
        if unknown or not text:
            known = (
                "A, C, G, T and IUPAC codes" if alphabet.name == "dna" else f"{letters} and X for all of them"
            )
            wrong = f"{unknown[0]!r} is unknown" if unknown else "it is empty"
            raise UserError(f"{option} {text!r}: {wrong}: write a motif in {known}")
        return cls(text, tuple(frozenset(map(letters.index, codes[letter])) for letter in text.upper()))

    def reverse_complement(self) -> Motif:
        """The motif as the opposite strand shows it. For dna, whose letters are A, C, G and T."""
        return Motif(
            self.text, tuple(frozenset(3 - letter for letter in place) for place in self.places[::-1])
        )


@dataclass(frozen=True)
class Automaton:
    """Reads letters and knows which motifs they complete.

    Attributes:
        forbidden, stops: the motifs.
        letters: how many letters the alphabet has.
    """

    forbidden: Sequence[Motif]
    stops: Sequence[Motif]
    letters: int

    def after(self, sequence: NDArray[np.integer]) -> int:
        """The state after a sequence of numbers of letters. What it completes does not count."""
        longest = max((len(motif.places) for motif in self._motifs), default=0)
        state = 0
        for letter in sequence[len(sequence) - min(longest, len(sequence)) :].tolist():
            state = self._next(state, letter) & ~self._ends
        return state

    def table(self, starts: Sequence[int]) -> Table:
        """All states that can be reached from those of `starts`.

        Raises:
            UserError: there are too many.
        """
        numbers = {state: number for number, state in enumerate(dict.fromkeys(starts))}
        queue, rows = list(numbers), []
        for state in queue:  # grows while it is read
            row = []
            for letter in range(self.letters):
                found = self._next(state, letter)
                if found & self._forbidden_ends:
                    row.append(FORBIDDEN)
                    continue
                if found & self._ends:
                    row.append(STOPS)
                    continue
                if found not in numbers:
                    numbers[found] = len(queue)
                    queue.append(found)
                row.append(numbers[found])
            rows.append(row)
            if len(queue) > MOST_STATES:
                raise UserError(
                    f"--forbid and --stop: the motifs need more than {MOST_STATES:,} states to be recognized: give "
                    "fewer, or shorter ones, or with fewer ambiguous letters"
                )
        return Table(np.array(rows, dtype=np.int64), [numbers[state] for state in starts])

    def _next(self, state: int, letter: int) -> int:
        """Shift-And (Baeza-Yates & Gonnet, Communications of the ACM 35, 1992): bit i is set if the letters so far end
        with the places of a motif up to place i, all motifs laid end to end."""
        return ((state << 1) | self._begins) & self._matching[letter]

    @property
    def _motifs(self) -> list[Motif]:
        return [*self.forbidden, *self.stops]

    @cached_property
    def _matching(self) -> list[int]:
        places = [place for motif in self._motifs for place in motif.places]
        return [
            sum(1 << i for i, place in enumerate(places) if letter in place) for letter in range(self.letters)
        ]

    @cached_property
    def _begins(self) -> int:
        return sum(1 << begin for begin, _ in self._borders)

    @cached_property
    def _ends(self) -> int:
        return sum(1 << (end - 1) for _, end in self._borders)

    @cached_property
    def _forbidden_ends(self) -> int:
        return sum(1 << (end - 1) for _, end in self._borders[: len(self.forbidden)])

    @property
    def _borders(self) -> list[tuple[int, int]]:
        """[first place, end) of each motif."""
        ends = np.cumsum([0] + [len(motif.places) for motif in self._motifs]).tolist()
        return list(itertools.pairwise(ends))


FORBIDDEN, STOPS = -1, -2


@dataclass(frozen=True)
class Table:
    """The reachable states of an automaton.

    Attributes:
        following: (states, letters) int64: the state after a letter; FORBIDDEN; or STOPS, where the sequence ends.
        starts: the state that each prompt leads to.
    """

    following: NDArray[np.int64]
    starts: list[int]

    def reach(self) -> NDArray[np.int64]:
        """How many letters can follow each state, (states,): ENDLESS if every number can, or a stop motif."""
        found = np.full(len(self.following), ENDLESS)
        alive, steps = np.ones(len(self.following) + 2, dtype=bool), 0
        alive[FORBIDDEN] = False  # the last entry; STOPS is the one before, and counts as alive
        while True:
            still = alive[self.following].any(axis=1) & alive[:-2]
            if (still == alive[:-2]).all():
                return found
            found[alive[:-2] & ~still] = steps
            alive[:-2] = still
            steps += 1

    def counts(self, length: int, counted: NDArray[np.bool_]) -> NDArray[np.int32]:
        """Fewest and most of the `counted` letters (letters,) among the next r letters, for r up to `length`.

        Returns:
            (2, length + 1, states); fewest is above and most below every number where r letters cannot follow.
        """
        states = len(self.following)
        found = np.zeros((2, length + 1, states), dtype=np.int32)
        none = np.int32(length + 1)
        for r in range(1, length + 1):
            for bound, worst, best in ((0, none, np.minimum), (1, -none, np.maximum)):
                before = np.append(found[bound, r - 1], worst)  # FORBIDDEN is -1, the last entry
                each = before[self.following]
                each = np.where(each == worst, worst, each + counted)
                found[bound, r] = best.reduce(each, axis=1)
        return found


class Guide:
    """Masks of the letters that each row may draw, one step after the other.

    Args:
        table: of the motifs.
        length: letters that a sequence gets.
        bounds: fewest and most letters of `counted` in a sequence; None: any number.
        counted: (letters,) bool.
        counts: `Table.counts`, if there are bounds.
    """

    def __init__(
        self, table: Table, length: int, bounds: tuple[int, int] | None, counted: NDArray[np.bool_]
    ) -> None:
        states = len(table.following)
        if bounds is not None and states * (length + 1) > MOST_COUNTS:
            raise UserError(
                f"--gc with --forbid: {states:,} states of the motifs and {length:,} letters are more than can be "
                "counted in memory: give fewer motifs, a smaller --length, or leave --gc out"
            )
        self.table, self.length, self.bounds = table, length, bounds
        self._counted = torch.from_numpy(counted)
        self._following = torch.from_numpy(table.following)
        self._reach = torch.from_numpy(table.reach())
        self._counts = None if bounds is None else torch.from_numpy(table.counts(length, counted))

    def to(self, device: torch.device) -> Guide:
        """Move the tables to a device; returns self."""
        for name in ("_counted", "_following", "_reach", "_counts"):
            tensor = getattr(self, name)
            setattr(self, name, None if tensor is None else tensor.to(device))
        return self

    def start(self, prompts: Sequence[int]) -> Tensor:
        """The state (rows, 2) of sequences after their prompts, given by number: automaton, counted letters."""
        numbers = [self.table.starts[prompt] for prompt in prompts]
        state = torch.tensor(numbers, device=self._following.device)
        return torch.stack((state, torch.zeros_like(state)), dim=1)

    def allowed(self, state: Tensor, step: int) -> Tensor:
        """The letters (rows, letters) bool that may come as number `step` of a sequence, counted from 0."""
        following = self._following[state[:, 0]]
        left = self.length - step - 1
        after = following.clamp(min=0)
        possible = (following == STOPS) | ((following >= 0) & (self._reach[after] >= left))
        if self.bounds is None:
            return possible
        assert self._counts is not None
        count = state[:, 1:] + self._counted
        fewest, most = self._counts[0, left][after], self._counts[1, left][after]
        low, high = self.bounds
        return possible & (count + fewest <= high) & (count + most >= low)

    def advance(self, state: Tensor, letter: Tensor) -> tuple[Tensor, Tensor]:
        """The states after a letter (rows,) each, and which rows (rows,) bool have now completed a stop motif.

        A row that was stopped goes on from any state: its letters no longer count.
        """
        following = self._following[state[:, 0]].gather(1, letter[:, None]).squeeze(1)
        count = state[:, 1] + self._counted[letter]
        return torch.stack((following.clamp(min=0), count), dim=1), following == STOPS


def share_bounds(low: float, high: float, length: int) -> tuple[int, int]:
    """The fewest and most letters of `length` whose share lies in [low, high]."""
    slack = 1e-9 * length
    return math.ceil(low * length - slack), math.floor(high * length + slack)
