"""Reading the options of `megabase bench`."""

from __future__ import annotations

from megabase.pipeline.bench.options import depths_of, lengths_of


def test_lengths_and_depths():
    assert lengths_of("--lengths", "1M, 4k,512,4096") == [512, 4096, 1 << 20]
    assert depths_of("--depths", "12,2") == [2, 12]
    assert depths_of("--depths", "0") == []
