"""Segments made by hand."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from megabase.datamodules.alphabet import Alphabet
from megabase.datamodules.index.segments import Segments


class Made(SimpleNamespace):
    """One row of `made`."""

    def __init__(self, bases: bytes, split: str = "train", **more: Any) -> None:
        super().__init__(
            **{
                "record": "r",
                "source": "s.fa",
                "start": 0,
                "intervals": (),
                "bases": bases,
                "split": split,
                **more,
            }
        )


def made(rows: Sequence[Made]) -> Segments:
    """Segments of rows given outright."""
    gaps = [Alphabet.named("dna").gaps(np.frombuffer(row.bases, np.uint8)) for row in rows]
    intervals = [np.array(row.intervals, np.int64).reshape(-1, 2) for row in rows]
    zeros = np.zeros(len(rows), np.int64)

    def names(name: str) -> np.ndarray:
        return np.array([getattr(row, name) for row in rows], object)

    return Segments(
        record=names("record"),
        source=names("source"),
        split=names("split"),
        start=np.array([row.start for row in rows], np.int64),
        length=np.array([len(row.bases) for row in rows], np.int64),
        shard=names("record"),
        offset=zeros,
        line_bases=zeros,
        line_bytes=zeros,
        crc32=zeros.astype(np.uint32),
        blocks=np.zeros(0, np.uint32),
        block_bounds=np.zeros(len(rows) + 1, np.int64),
        gaps=np.concatenate(gaps),
        gap_bounds=np.cumsum([0, *map(len, gaps)]),
        intervals=np.concatenate(intervals),
        interval_bounds=np.cumsum([0, *map(len, intervals)]),
    )
