"""How many letters a stretch of a record holds, from the index alone: prefix sums over its gaps.

A few numbers per segment and gap, whatever the windows are: 24 bytes a gap, 8 a segment.
"""

import numpy as np
from numpy.typing import NDArray

from megabase.datamodules.index.segments import Segments


class Letters:
    """Letters of any part of any row of `segments`.

    Rows lie end to end on one line of bases, so that a single search finds the gaps before a place.
    """

    def __init__(self, segments: Segments) -> None:
        ends = np.cumsum(segments.length)
        self.base = ends - segments.length
        row = np.repeat(np.arange(len(segments)), np.diff(segments.gap_bounds))
        self.begin = self.base[row] + segments.gaps[:, 0]
        self.end = np.concatenate([[0], self.begin + segments.gaps[:, 1]])
        self.missing = np.concatenate([[0], np.cumsum(segments.gaps[:, 1])])

    def count(
        self, rows: NDArray[np.int64], starts: NDArray[np.int64], length: int | NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Letters in [start, start + length) of each row, which must lie in the row; shapes broadcast."""
        first = self.base[rows] + starts
        return length - (self._missing_before(first + length) - self._missing_before(first))

    def gaps_of(
        self, rows: NDArray[np.int64], starts: NDArray[np.int64], lengths: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """First and one past the last of the gaps that touch [start, start + length) of each row, in all gaps."""
        first = self.base[rows] + starts
        return np.searchsorted(self.end[1:], first, side="right"), np.searchsorted(
            self.begin, first + lengths
        )

    def _missing_before(self, place: NDArray[np.int64]) -> NDArray[np.int64]:
        """Non-letters before places on the line of bases."""
        met = np.searchsorted(self.begin, place)
        return self.missing[met] - np.maximum(self.end[met] - place, 0)
