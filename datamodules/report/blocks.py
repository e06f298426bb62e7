"""A fixed sample of the bases of a shard set: blocks spread evenly over it."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from megabase.datamodules.index.segments import Part, Segments


def spread_blocks(segments: Segments, rows: NDArray[np.int64], bases: int, block: int) -> Iterator[Part]:
    """Blocks of the segments in `rows`: all of them, or evenly spread ones of about `bases` bases together.

    Args:
        segments: the index.
        rows: rows of the index.
        bases: how many bases to sample.
        block: bases of a block; the last of a segment may be shorter.

    Yields:
        Always the same ones.
    """
    total = int(segments.length[rows].sum())
    passed = taken = 0
    for row in rows.tolist():
        for start in range(0, int(segments.length[row]), block):
            length = min(block, int(segments.length[row]) - start)
            if taken * total <= passed * bases:
                taken += length
                yield Part(row, start, length)
            passed += length
