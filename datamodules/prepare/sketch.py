"""Samples the 31-mers of DNA, so that what two splits share can be counted without keeping their bases.

FracMinHash (Irber et al., bioRxiv 2022.01.11.475838): a 31-mer, read on either strand, is kept if its hash lies below a
limit. So the same 31-mers are kept wherever they occur, and shares of samples estimate shares of all 31-mers. For a
sample of at most one in 128, a 31-mer must also have a given word of four bases at its centre: finding that takes a few
operations on bytes, and only what has it is hashed.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

K = 31
"""Bases of a k-mer. Odd, so that none is its own reverse complement. Two genomes that are 95 % identical, about the
border of a species, share a fifth of their 31-mers (0.95^31)."""

Kmers = NDArray[np.uint64]
"""Hashes of sampled 31-mers, sorted, each once."""

Gaps = Sequence[Sequence[int]]
"""[start, length] of the runs of bytes that are not A, C, G or T, in order."""

_FINEST = 16
_SMALL = 1 << 22  # bases of inputs that every position is hashed of
_WORDS = 128  # one in this many 31-mers has the word at its centre
_MOST = 1 << 20  # 31-mers kept of all splits together
_MOST_OF_RECORDS = 1 << 23  # and of all records, where short ones are compared: 64 MiB
_PIECE = 1 << 19  # positions at once: stays in the cache

# Bits 1 and 2 of an ASCII letter, in either case, are A 0, C 1, T 2, G 3; the complement differs by 2.
_WORD, _WORD_ON_THE_OTHER_STRAND = 0b01_00_11_10, 0b00_01_10_11  # CAGT, ACTG
_CENTRE = 13
_COMPLEMENT = np.uint64(0x2AAAAAAAAAAAAAAA)


def scale_for(bases: int) -> int:
    """One in how many 31-mers to keep of the splits of about this many bases: 16, or a power of two from 128 on."""
    return _FINEST if bases <= _SMALL else _doubled(_WORDS, bases, _MOST)


def finest_scale(bases: int) -> int:
    """One in how many 31-mers to keep of records of about this many bases in all: a power of two from 16 on."""
    return _doubled(_FINEST, bases, _MOST_OF_RECORDS)


def _doubled(scale: int, bases: int, most: int) -> int:
    """The least power of two times `scale` with which no more than `most` 31-mers are kept."""
    while bases > scale * most:
        scale *= 2
    return scale


def united(parts: Iterable[Kmers]) -> Kmers:
    """The 31-mers of any of the parts."""
    found = np.sort(np.concatenate([np.zeros(0, np.uint64), *parts]))  # faster than numpy.unique
    kept = np.ones(len(found), bool)
    np.not_equal(found[1:], found[:-1], out=kept[1:])
    return found[kept]


def count_shared(part: Kmers, whole: Kmers) -> int:
    """How many of the 31-mers of `part` are in `whole`."""
    if not len(whole):
        return 0
    at = np.minimum(np.searchsorted(whole, part), len(whole) - 1)
    return int(np.count_nonzero(whole[at] == part))


@dataclass(frozen=True)
class Sampling:
    """How 31-mers are sampled.

    Attributes:
        scale: one in how many is kept; a power of two.
        of_records: keep those of every record, instead of every split.
    """

    scale: int
    of_records: bool = False

    def key(self, record: str, split: str) -> str:
        """What the 31-mers of a segment are kept under."""
        return record if self.of_records else split


class Sampler:
    """Collects the sampled 31-mers of segments by a key: a split, or a record.

    Short segments are joined before they are sampled, because an operation on an array takes a microsecond.
    """

    def __init__(self, scale: int) -> None:
        """
        Args:
            scale: one in how many 31-mers to keep; a power of two.
        """
        self._scale = scale
        self._found: dict[str, list[Kmers]] = {}
        self._waiting: list[tuple[str, bytes, Gaps]] = []
        self._bytes_waiting = 0

    def add(self, key: str, bases: bytes | memoryview, gaps: Gaps) -> None:
        """Sample a segment; `key` says whose 31-mers these are."""
        self._found.setdefault(key, [])
        if len(bases) >= _PIECE:
            self._found[key].append(_sampled(bases, gaps, self._scale)[1])
            return
        self._waiting.append((key, bytes(bases), gaps))
        self._bytes_waiting += len(bases)
        if self._bytes_waiting >= _PIECE:
            self._sample_waiting()

    def finish(self) -> dict[str, Kmers]:
        """Key -> its 31-mers."""
        self._sample_waiting()
        return {key: united(found) for key, found in self._found.items()}

    def _sample_waiting(self) -> None:
        """Sample the short segments, joined with an N between them."""
        if not self._waiting:
            return
        numbers = {key: number for number, key in enumerate(dict.fromkeys(key for key, *_ in self._waiting))}
        starts, gaps, end = [], [], 0
        for _, bases, own in self._waiting:
            starts.append(end)
            gaps += [[end + start, length] for start, length in own]
            end += len(bases) + 1
            gaps.append([end - 1, 1])
        at, hashes = _sampled(b"N".join(bases for _, bases, _ in self._waiting), gaps, self._scale)
        segment = np.searchsorted(starts, at, side="right") - 1
        number = np.array([numbers[key] for key, *_ in self._waiting])[segment]
        order = np.argsort(number, kind="stable")
        bounds = np.searchsorted(number[order], np.arange(1, len(numbers)))
        for key, part in zip(numbers, np.split(hashes[order], bounds), strict=True):
            self._found[key].append(part)
        self._waiting, self._bytes_waiting = [], 0


def _sampled(sequence: bytes | memoryview, gaps: Gaps, scale: int) -> tuple[NDArray[np.int64], Kmers]:
    """Where the sampled 31-mers of a sequence start, and their hashes; in the sequence's order."""
    bases = np.frombuffer(sequence, np.uint8)
    with_word = scale >= _WORDS
    limit = np.uint64((1 << 64) // (scale // _WORDS if with_word else scale) - 1)
    bounds = np.array(gaps, np.int64).reshape(-1, 2)
    starts: list[NDArray[np.int64]] = [np.zeros(0, np.int64)]
    found: list[Kmers] = [np.zeros(0, np.uint64)]
    piece = _PIECE if with_word else _PIECE // 4
    for start in range(0, len(bases) - K + 1, piece):
        at, numbers = _candidates(bases[start : start + piece + K - 1], with_word)
        at += start
        hashes = _hashes(numbers)
        kept = hashes < limit
        if len(bounds):
            kept &= _outside(at, bounds)
        starts.append(at[kept])
        found.append(hashes[kept])
    return np.concatenate(starts), np.concatenate(found)


def _candidates(bases: NDArray[np.uint8], with_word: bool) -> tuple[NDArray[np.int64], Kmers]:
    """Where 31-mers start in a piece, and the 31-mers as numbers of 62 bits; all, or those with the word."""
    codes = (bases >> 1) & 3
    pairs = codes[:-1] * np.uint8(4) + codes[1:]  # faster than shifts
    fours = pairs[:-2] * np.uint8(16) + pairs[2:]
    count = len(bases) - K + 1
    if with_word:
        has_word = fours[_CENTRE : _CENTRE + count] == _WORD
        has_word |= fours[_CENTRE + 1 : _CENTRE + 1 + count] == _WORD_ON_THE_OTHER_STRAND
        at = np.flatnonzero(has_word)
    else:
        at = np.arange(count)
    numbers = np.zeros(len(at), np.uint64)
    for step in range(0, K - 4, 4):
        numbers = numbers << np.uint64(8) | fours[at + step]
    last = (fours[at + K - 4] & 63).astype(np.uint64)
    return at, numbers << np.uint64(6) | last


def _hashes(numbers: Kmers) -> Kmers:
    """Mixed bits of the lesser of a 31-mer and its reverse complement (the finalizer of splitmix64)."""
    other = numbers ^ _COMPLEMENT
    for bits, mask in ((2, 0x3333333333333333), (4, 0x0F0F0F0F0F0F0F0F)):
        low = np.uint64(mask)
        other = (other >> np.uint64(bits)) & low | (other & low) << np.uint64(bits)
    mixed: Kmers = np.minimum(numbers, other.byteswap() >> np.uint64(2))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ mixed >> np.uint64(shift)) * np.uint64(factor)
    return mixed ^ mixed >> np.uint64(31)


def _outside(starts: NDArray[np.int64], gaps: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether each 31-mer touches no gap."""
    following = np.searchsorted(
        gaps.sum(axis=1), starts, side="right"
    )  # the first gap that ends behind the start
    begins = np.append(gaps[:, 0], np.iinfo(np.int64).max)[following]
    untouched: NDArray[np.bool_] = begins >= starts + K
    return untouched
