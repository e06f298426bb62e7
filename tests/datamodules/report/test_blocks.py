"""Sampling of blocks."""

import numpy as np

from megabase.datamodules.index.shard_index import ShardIndex
from megabase.datamodules.report.blocks import spread_blocks


def test_the_sample_is_bounded_and_reaches_everywhere(ecoli_shards: ShardIndex) -> None:
    segments = ecoli_shards.segments
    rows = np.arange(len(segments))
    blocks = list(spread_blocks(segments, rows, 1_000_000, 1 << 16))
    taken = sum(length for _, _, length in blocks)
    assert abs(taken - 1_000_000) <= 2 * (1 << 16)
    starts = np.array([segments.start[row] + start for row, start, _ in blocks])
    assert starts.min() < 500_000
    assert starts.max() > 4_400_000
    assert np.diff(starts).max() < 10 * (1 << 16)
    assert (
        sum(length for *_, length in spread_blocks(segments, rows, 1 << 40, 1 << 16)) == segments.length.sum()
    )
