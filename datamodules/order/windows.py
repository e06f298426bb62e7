"""The windows of a split as numbers: window id -> row of the index and first base. Built by `planning`.

Memory is a few numbers per segment, BED interval and gap (a run of bases that are not letters), whatever the number of
windows: the 3 million windows of 1024 bases of a human genome take less than 1 MB.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from megabase.datamodules.index.letters import Letters
from megabase.datamodules.order.packing import Tape

PACKED = -1
"""In place of a row of the index: the window is packed, and its start is a position of the tape."""


@dataclass(frozen=True, eq=False)
class Runs:
    """Evenly spaced windows, run by run. The windows are counted through, those with few letters too.

    Attributes:
        rows: (runs,) row of the index, or `PACKED`.
        starts: (runs,) first base of the first window: counted in the segment, or a position of the tape.
        steps: (runs,) bases from the start of one window to the start of the next.
        first: (runs + 1,) number of windows before each run; the last is the number of all windows.
    """

    rows: NDArray[np.int64]
    starts: NDArray[np.int64]
    steps: NDArray[np.int64]
    first: NDArray[np.int64]

    def locate(self, numbers: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Numbers of windows (any shape) -> their rows and starts, same shape."""
        run = np.searchsorted(self.first, numbers, side="right") - 1
        return self.rows[run], self.starts[run] + (numbers - self.first[run]) * self.steps[run]


@dataclass(frozen=True, eq=False)
class WindowPlan:
    """The windows of a split that hold enough letters, with ids 0 .. n-1.

    Ids go by group of the mixture, within a group in the order of the index, with packed windows last.

    Attributes:
        split: its name.
        length: bases per window.
        letters: counts the letters of any part of any row.
        segment_length: (rows of the index,) bases.
        runs: all windows, those with too few letters included.
        skip_ids: (ranges,) ranges of windows with too few letters are skipped; the id of the window after each range.
        skipped: (ranges + 1,) number of windows skipped before each range, and in all.
        bounds: (groups + 1,) group g holds the ids [bounds[g], bounds[g + 1]).
        weights: (groups,) weights of the mixture.
        tape: the packed segments; None without packing.
        left_out: bases of segments that are too short for a window and not packed.
    """

    split: str
    length: int
    letters: Letters
    segment_length: NDArray[np.int64]
    runs: Runs
    skip_ids: NDArray[np.int64]
    skipped: NDArray[np.int64]
    bounds: tuple[int, ...]
    weights: tuple[float, ...]
    tape: Tape | None
    left_out: int

    def __len__(self) -> int:
        """n, the number of windows."""
        return int(self.runs.first[-1] - self.skipped[-1])

    def locate(self, ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Where windows lie.

        Args:
            ids: in [0, n), any shape.

        Returns:
            Rows of the index and first bases within their segments, int64 of the same shape. A packed window has the
            row `PACKED` and a position of the tape.

        Raises:
            IndexError: an id lies outside [0, n).
        """
        ids = np.asarray(ids, np.int64)
        if ids.size and (ids.min() < 0 or ids.max() >= len(self)):
            raise IndexError(f"window ids of split {self.split!r} must lie in [0, {len(self)})")
        return self.runs.locate(ids + self.skipped[np.searchsorted(self.skip_ids, ids, side="right")])

    def ids_of_row(self, row: int) -> NDArray[np.int64]:
        """Ids of the windows in a row of the index, in a plan of one group without packing."""
        numbers = self.runs.first[np.searchsorted(self.runs.rows, [row, row + 1])]
        skips = np.searchsorted(self._skip_starts, numbers)  # ranges of skipped windows that start before
        low, high = np.maximum(numbers - self.skipped[skips], np.append(0, self.skip_ids)[skips])
        return np.arange(low, high)

    @cached_property
    def _skip_starts(self) -> NDArray[np.int64]:
        """(ranges,) number of the first window of each range of skipped ones."""
        starts: NDArray[np.int64] = self.skip_ids + self.skipped[:-1]
        return starts

    def count_letters(self, rows: NDArray[np.int64], starts: NDArray[np.int64]) -> NDArray[np.int64]:
        """Letters of windows anywhere, known from the index alone.

        Args:
            rows, starts: as `locate` returns them, any shape; a window of a row may start at any base that leaves it
                inside the segment.

        Returns:
            int64 of the same shape.
        """
        if self.tape is None:
            return self.letters.count(rows, starts, self.length)
        packed, found = rows == PACKED, np.empty_like(starts)
        found[~packed] = self.letters.count(rows[~packed], starts[~packed], self.length)
        found[packed] = self.tape.count(starts[packed])
        return found

    def moved(
        self, rows: NDArray[np.int64], starts: NDArray[np.int64], by: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Starts of windows after a move of `by` bases each, kept inside their segments. Packed windows do not move."""
        inside = np.clip(starts + by, 0, self.segment_length[rows] - self.length)
        return np.where(rows == PACKED, starts, inside)
