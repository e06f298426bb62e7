"""Markov models of a fixed order: the baseline in bits per base that a trained model must beat.

An order-k model counts in one split which letter follows each context of k letters, and predicts the letters of
another split from these counts. Counts are smoothed by adding one to every letter of every context (Laplace):
P(b | c) = (count(c b) + 1) / (count(c) + A), with A letters in the alphabet. A context lies within one segment and
holds letters only; a letter without a full context before it is not scored.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from megabase.datamodules.alphabet import FIRST_LETTER
from megabase.datamodules.errors import DataError
from megabase.datamodules.index.index_file import BLOCK_BYTES
from megabase.datamodules.index.segments import TRAIN, VALID
from megabase.datamodules.index.shard_index import ShardIndex
from megabase.datamodules.report.blocks import spread_blocks

FIT_BASES = 64_000_000
SCORE_BASES = 16_000_000
_BLOCK = 1 << 20
_MOST_COUNTS = 1 << 24


def bits_per_base(
    index: ShardIndex,
    orders: Sequence[int] | None = None,
    fit: str = TRAIN,
    score: str = VALID,
    fit_bases: int = FIT_BASES,
    score_bases: int = SCORE_BASES,
    skip: bool = False,
) -> dict[int, float]:
    """Fit Markov models on one split and score another one.

    Memory: a block of a million bases, and the counts of one order, at most 2^24.

    Args:
        index: the opened shards.
        orders: of the models; None for 0 to 5, as far as they need at most 2^24 counts.
        fit: split to count in.
        score: split to predict.
        fit_bases, score_bases: about as many bases are read, always the same ones: blocks spread evenly over the split.
        skip: leave out bases that cannot be read, instead of raising.

    Returns:
        Order -> bits per letter of split `score`.

    Raises:
        DataError: a split holds no full context; an order needs more than 2^24 counts; bases cannot be read.
    """
    letters = len(index.alphabet.letters)
    if orders is None:
        orders = [order for order in range(6) if letters ** (order + 1) <= _MOST_COUNTS]
    result = {}
    for order in orders:
        if letters ** (order + 1) > _MOST_COUNTS:
            raise DataError(
                f"Markov order {order} with {letters} letters: needs more than {_MOST_COUNTS} counts"
            )
        seen = _counts(index, fit, order, fit_bases, skip)
        scored = _counts(index, score, order, score_bases, skip)
        predicted = (seen + 1) / (seen + 1).sum(axis=1, keepdims=True)
        result[order] = float(-(scored * np.log2(predicted)).sum() / scored.sum())
    return result


def _counts(index: ShardIndex, split: str, order: int, bases: int, skip: bool) -> NDArray[np.int64]:
    """(A^order, A) how often each letter follows each context, in about `bases` bases of the split."""
    letters = len(index.alphabet.letters)
    counts = np.zeros(letters ** (order + 1), np.int64)
    rows = index.segments.rows_of(split)
    for row, start, length in spread_blocks(index.segments, rows, bases, _BLOCK):
        before = min(order, start)  # the context of the block's first letter
        for tokens in _tokens(index, row, start - before, before + length, skip):
            codes = tokens.astype(np.int64) - FIRST_LETTER
            counts += np.bincount(_words(codes, order + 1, letters), minlength=len(counts))
    if not counts.any():
        raise DataError(
            f"split {split!r} holds no run of {order + 1} letters, which Markov order {order} needs"
        )
    return counts.reshape(-1, letters)


def _tokens(
    index: ShardIndex, row: int, start: int, length: int, skip: bool
) -> Iterator[NDArray[np.integer]]:
    """Tokens of a part of a row; with `skip`, piece by piece, without the checksum blocks that cannot be read."""
    try:
        yield index.alphabet.encode(index.read(row, start, length))
    except DataError:
        if not skip:
            raise
        cut = -(-(start + length // 2) // BLOCK_BYTES) * BLOCK_BYTES - start
        if cut < length:
            yield from _tokens(index, row, start, cut, skip)
            yield from _tokens(index, row, start + cut, length - cut, skip)


def _words(codes: NDArray[np.int64], size: int, letters: int) -> NDArray[np.int64]:
    """Codes (length,), negative for non-letters -> the words of `size` letters, as numbers in base A."""
    ends = max(len(codes) - size + 1, 0)
    words = np.zeros(ends, np.int64)
    letters_only = np.ones(ends, bool)
    for shift in range(size):
        part = codes[shift : shift + ends]
        words = words * letters + part
        letters_only &= part >= 0
    return words[letters_only]
