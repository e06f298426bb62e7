"""Packs segments that are shorter than a window into full windows.

The segments of a group lie one after another on a tape, with a separator between two. A window is `length` positions of
the tape, from a multiple of `length` on. Every group begins at such a multiple, so the last window of a group ends in
padding. A segment that crosses the end of a window continues in the next one.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megabase.datamodules.index.letters import Letters


class Piece(NamedTuple):
    """Part of a packed window: bases [start, start + length) of a row, at position `at` of the window."""

    row: int
    start: int
    at: int
    length: int


class Tape:
    """The packed segments.

    Attributes:
        length: positions of a window.
        rows: (segments,) int64, their rows in the index.
        begin, end: (segments,) int64, the positions [begin, end) of the tape where they lie.
        followed: (segments,) bool, whether a separator follows.
        windows: (groups, 2) int64, first position of each group and number of its windows.
    """

    def __init__(
        self, letters: Letters, lengths: NDArray[np.int64], groups: Sequence[NDArray[np.int64]], length: int
    ) -> None:
        """
        Args:
            letters: counts the letters of any part of any row.
            lengths: bases of every row of the index.
            groups: rows of each group in the order to pack them; each shorter than `length`.
            length: positions of a window.
        """
        self._letters = letters
        self.length = length
        begins, followed, windows, first = [], [], [], 0
        for rows in groups:
            sizes = lengths[rows] + 1
            used = int(sizes.sum()) - 1 if len(rows) else 0
            begins.append(first + np.cumsum(sizes) - sizes)
            followed.append(np.arange(len(rows)) < len(rows) - 1)
            windows.append((first, -(-used // length)))
            first += windows[-1][1] * length
        self.rows = np.concatenate(groups)
        self.begin = np.concatenate(begins)
        self.end = self.begin + lengths[self.rows]
        self.followed = np.concatenate(followed)
        self.windows = np.array(windows, np.int64)
        counts = letters.count(self.rows, np.zeros_like(self.rows), lengths[self.rows])
        self._before = np.concatenate([[0], np.cumsum(counts)])

    def count(self, starts: NDArray[np.int64]) -> NDArray[np.int64]:
        """Letters of the windows that begin at positions `starts` of the tape."""
        return self._letters_before(starts + self.length) - self._letters_before(starts)

    def pieces(self, start: int) -> list[Piece]:
        """The parts of segments in the window at position `start` of the tape, in order."""
        stop = start + self.length
        first, last = np.searchsorted(self.end, start, side="right"), np.searchsorted(self.begin, stop)
        found = []
        for row, begin, end in zip(
            self.rows[first:last].tolist(),
            self.begin[first:last].tolist(),
            self.end[first:last].tolist(),
            strict=True,
        ):
            low = max(begin, start)
            found.append(Piece(row, low - begin, low - start, min(end, stop) - low))
        return found

    def separators(self, start: int) -> NDArray[np.int64]:
        """Positions in the window at position `start` of the tape that hold a separator."""
        first, last = np.searchsorted(self.end, [start, start + self.length])
        return self.end[first:last][self.followed[first:last]] - start

    def _letters_before(self, position: NDArray[np.int64]) -> NDArray[np.int64]:
        """Letters before positions of the tape."""
        piece = (
            np.searchsorted(self.begin, position) - 1
        )  # the last segment that begins before the position; -1: there is none
        safe = np.maximum(piece, 0)
        inside = np.minimum(position, self.end[safe]) - self.begin[safe]
        part = self._letters.count(self.rows[safe], np.zeros_like(safe), np.maximum(inside, 0))
        return np.where(piece < 0, 0, self._before[safe] + part)
