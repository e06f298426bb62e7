"""Nats and bases window by window, from which means and their intervals are computed.

A rank tallies its own windows. Merged tallies are sorted by window, so the results are the same on any number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megabase.pipeline.inference.scoring import bits

RESAMPLES = 1000
CONFIDENCE = 0.95
MOST_BLOCKS = 4096
_SEED = 0


@dataclass(frozen=True)
class Interval:
    """A mean in bits per base, and what it is of.

    Attributes:
        value: bits per base.
        low, high: the middle CONFIDENCE of the means of bootstrap samples; equal to `value` if there is one window.
        bases: number of scored bases.
    """

    value: float
    low: float
    high: float
    bases: int


@dataclass(frozen=True, eq=False)
class Tally:
    """Sums over groups of bases, for each window.

    Attributes:
        samples: (windows,) int64 window ids.
        nats: (windows, groups) fp64.
        bases: (windows, groups) int64, scored bases.
    """

    samples: NDArray[np.int64]
    nats: NDArray[np.float64]
    bases: NDArray[np.int64]

    @staticmethod
    def merged(parts: Sequence[Tally]) -> Tally:
        """The tallies of all ranks as one, without filler, sorted by window."""
        samples = np.concatenate([part.samples for part in parts])
        order = np.argsort(samples, kind="stable")
        order = order[samples[order] >= 0]
        return Tally(
            samples[order],
            np.concatenate([part.nats for part in parts])[order],
            np.concatenate([part.bases for part in parts])[order],
        )

    def mean(self, group: int) -> Interval | None:
        """Bits per base of a group, with an interval; None if no base of it was scored."""
        return mean(self.nats[:, group], self.bases[:, group])

    def gain(self, group: int, other: Tally, of: int) -> Interval | None:
        """How many bits per base group `of` of another tally of the same windows has more than `group`."""
        return mean(other.nats[:, of] - self.nats[:, group], self.bases[:, group])


def mean(nats: NDArray[np.float64], bases: NDArray[np.int64]) -> Interval | None:
    """The mean of all bases, and its bootstrap interval.

    Windows are drawn with replacement, RESAMPLES times, always the same ones (Efron & Tibshirani 1993, percentile
    intervals). Of many windows, up to MOST_BLOCKS blocks of neighbours are drawn.

    Args:
        nats: (windows,) sums.
        bases: (windows,) how many bases each is the sum of.
    """
    total = int(bases.sum())
    if not total:
        return None
    value = bits(float(nats.sum()) / total)
    blocks = min(len(nats), MOST_BLOCKS)
    starts = np.arange(blocks) * len(nats) // blocks
    sums, counts = np.add.reduceat(nats, starts), np.add.reduceat(bases, starts)
    drawn = np.random.default_rng(_SEED)
    found = []
    for _ in range(RESAMPLES):
        chosen = drawn.integers(0, blocks, blocks)
        if of_chosen := int(counts[chosen].sum()):
            found.append(bits(float(sums[chosen].sum()) / of_chosen))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(found, [tail, 1 - tail]) if found else (math.nan, math.nan)
    return Interval(value, float(low), float(high), total)
