"""Markov models of a fixed order: the baseline in bits per base that a trained model must beat.

An order-k model counts in one split which letter follows each context of k letters, and predicts the letters of
another split from these counts. Counts are smoothed by adding one to every letter of every context (Laplace):
P(b | c) = (count(c b) + 1) / (count(c) + A), with A letters in the alphabet. A context lies within one segment and
holds letters only; a letter without a full context before it is not scored.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from megabase.datamodules.alphabet import FIRST_LETTER
from megabase.datamodules.errors import DataError
from megabase.datamodules.index.index_file import BLOCK_BYTES
from megabase.datamodules.index.segments import TRAIN, VALID, Part
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
    name, parts = f"split {score!r}", _blocks(index, score, score_bases)
    return bits_of_parts(index, {name: parts}, orders, fit, fit_bases, skip)[name]


def bits_of_parts(
    index: ShardIndex,
    scored: Mapping[str, Sequence[Part]],
    orders: Sequence[int] | None = None,
    fit: str = TRAIN,
    fit_bases: int = FIT_BASES,
    skip: bool = False,
) -> dict[str, dict[int, float]]:
    """Fit Markov models on one split and score several samples of bases.

    Memory: a part or a block of a million bases, and twice the counts of one order, at most 2^24.

    Args:
        index: the opened shards.
        scored: the parts of each sample by its name, which an error names. A letter at the start of a part has the
            letters before it as its context.
        orders, fit, fit_bases, skip: see `bits_per_base`.

    Returns:
        Name -> order -> bits per letter. Raises as `bits_per_base`.
    """
    letters = len(index.alphabet.letters)
    if orders is None:
        orders = [order for order in range(6) if letters ** (order + 1) <= _MOST_COUNTS]
    fitted = _blocks(index, fit, fit_bases)
    results: dict[str, dict[int, float]] = {name: {} for name in scored}
    for order in orders:
        if letters ** (order + 1) > _MOST_COUNTS:
            raise DataError(
                f"Markov order {order} with {letters} letters: needs more than {_MOST_COUNTS} counts"
            )
        seen = _counts(index, f"split {fit!r}", fitted, order, skip)
        bits = -np.log2((seen + 1) / (seen + 1).sum(axis=1, keepdims=True))
        for name, parts in scored.items():
            counts = _counts(index, name, parts, order, skip)
            results[name][order] = float((counts * bits).sum() / counts.sum())
    return results


def _blocks(index: ShardIndex, split: str, bases: int) -> list[Part]:
    """Parts of a split with about `bases` bases."""
    return list(spread_blocks(index.segments, index.segments.rows_of(split), bases, _BLOCK))


def _counts(index: ShardIndex, name: str, parts: Iterable[Part], order: int, skip: bool) -> NDArray[np.int64]:
    """(A^order, A) how often each letter follows each context in the parts of the sample called `name`."""
    letters = len(index.alphabet.letters)
    counts = np.zeros(letters ** (order + 1), np.int64)
    for row, start, length in parts:
        before = min(order, start)  # the context of the part's first letter
        for tokens in _tokens(index, row, start - before, before + length, skip):
            codes = tokens.astype(np.int64) - FIRST_LETTER
            counts += np.bincount(_words(codes, order + 1, letters), minlength=len(counts))
    if not counts.any():
        raise DataError(f"{name} holds no run of {order + 1} letters, which Markov order {order} needs")
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
