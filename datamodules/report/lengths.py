"""Counts, for one length of window, the windows of each split and the bases that are in none of them.

The numbers come from the index alone. They are for evaluation, and for training without `data.stride`: windows lie side
by side.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from megabase.datamodules.config import DataConfig
from megabase.datamodules.errors import DataError
from megabase.datamodules.index.segments import Segments
from megabase.datamodules.order.planning import plan_windows


@dataclass(frozen=True)
class LengthReport:
    """One split at one length. A base is in a window, in a short segment, at an end, or in a window that is left out.

    Attributes:
        split: its name.
        length: bases of a window.
        bases: of the split.
        windows: their number with default settings.
        short_segments, short_bases: segments shorter than `length`, which are in no window, and their bases.
        end_bases: bases behind the last window of the other segments, or outside BED intervals.
        sparse_bases: bases of windows that are left out because they have too few letters.
        packed_windows: windows with data.pack=true, which joins short segments.
    """

    split: str
    length: int
    bases: int
    windows: int
    short_segments: int
    short_bases: int
    end_bases: int
    sparse_bases: int
    packed_windows: int

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def at_length(segments: Segments, split: str, length: int) -> LengthReport:
    """Count the windows of a split. Raises DataError for a length below 1."""
    if length < 1:
        raise DataError(f"--length {length}: must be at least 1 base")
    rows = segments.rows_of(split)
    lengths = segments.length[rows]
    short = lengths < length
    bases, short_bases = int(lengths.sum()), int(lengths[short].sum())
    windows = count_windows(segments, split, length)
    with_bed = bool((np.diff(segments.interval_bounds)[rows] > 0).any())  # their windows may overlap
    every = int((lengths[~short] // length).sum())
    sparse = 0 if with_bed else (every - windows) * length
    return LengthReport(
        split=split,
        length=length,
        bases=bases,
        windows=windows,
        short_segments=int(short.sum()),
        short_bases=short_bases,
        end_bases=max(bases - short_bases - windows * length - sparse, 0),
        sparse_bases=sparse,
        packed_windows=count_windows(segments, split, length, pack=True),
    )


def count_windows(segments: Segments, split: str, length: int, pack: bool = False) -> int:
    """The number of windows of a split with default settings, and with or without data.pack."""
    try:
        return len(plan_windows(segments, split, length, DataConfig().min_real, pack=pack))
    except DataError:  # the split has no window of that length
        return 0
