"""Sorted ranges of integers as arrays (n, 2) of [first, end), int64."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

_CHUNK = 1 << 20


def counted_up(low: NDArray[np.int64], high: NDArray[np.int64]) -> NDArray[np.int64]:
    """low[0], low[0] + 1, ... high[0] - 1, low[1], ... one after another; nothing for a range with high <= low."""
    counts = np.maximum(high - low, 0)
    before = np.cumsum(counts) - counts
    return np.arange(int(counts.sum())) + np.repeat(low - before, counts)


def united(ranges: NDArray[np.int64]) -> NDArray[np.int64]:
    """Ranges in any order -> sorted ranges of the same integers that neither overlap nor touch."""
    if not len(ranges):
        return ranges
    ranges = ranges[np.argsort(ranges[:, 0], kind="stable")]
    reach = np.maximum.accumulate(ranges[:, 1])
    begins = np.concatenate([[0], np.flatnonzero(ranges[1:, 0] > reach[:-1]) + 1])
    ends = np.concatenate([begins[1:] - 1, [len(ranges) - 1]])
    return np.stack([ranges[begins, 0], reach[ends]], axis=1)


def integers(ranges: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    """The integers in sorted ranges, in arrays of at most 2^20, so that many of them need little memory."""
    ends = np.cumsum(ranges[:, 1] - ranges[:, 0])
    for start in range(0, int(ends[-1]) if len(ends) else 0, _CHUNK):
        place = np.arange(start, min(start + _CHUNK, int(ends[-1])))
        within = np.searchsorted(ends, place, side="right")
        yield ranges[within, 1] - ends[within] + place


def ranges_of(integers: NDArray[np.int64]) -> NDArray[np.int64]:
    """Sorted, distinct integers (n,) -> their ranges."""
    if not len(integers):
        return np.zeros((0, 2), np.int64)
    breaks = np.flatnonzero(np.diff(integers) != 1)
    begins, ends = np.concatenate([[0], breaks + 1]), np.concatenate([breaks, [len(integers) - 1]])
    return np.stack([integers[begins], integers[ends] + 1], axis=1)
