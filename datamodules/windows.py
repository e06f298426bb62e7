"""Which windows exist, and in which order: pure functions of numbers.

Windows of a split do not overlap: they start at multiples of `length` within a segment, so none crosses a
split's border and every base of one is in at most one. A segment's tail shorter than `length` is in none.

Order is a function of (seed, step, global batch): position p = step * global_batch + slot of an endless
sequence, whose every n positions (an epoch) are a keyed permutation of the n windows. Nothing is shuffled in
memory: the permutation is computed at the positions asked for.

Memory is a few numbers per segment, and two per window that holds a gap (a run of non-letters): 24 bytes for
each of those. The 3 million windows of 1024 bases of a human genome, 5% of them touched by a gap, take 4 MB.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from datamodules.errors import DataError
from datamodules.hashing import GOLDEN, counted, mix, word
from datamodules.index import Segments

_ROUNDS = 8
_LEAST_BITS = 6


class Permutation:
    """A keyed bijection on [0, n), computed position by position in O(1) memory.

    An alternating Feistel network over a power of two that holds n, and cycle walking back into [0, n) (Black
    and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002, their method 2): fewer than 2 passes on
    average for n > 32. The round function is `hashing.mix`.
    """

    def __init__(self, key: int | NDArray[np.uint64], n: int) -> None:
        """key: an integer, taken modulo 2^64, or one uint64 for each position that will be asked for.

        n: size of the domain, at least 1, else ValueError.
        """
        if n < 1:
            raise ValueError(f"a permutation of {n} elements does not exist")
        bits = (n - 1).bit_length()
        # A domain just large enough for 5 or 6 elements would favour some of their orders (chi-square, tests).
        bits = max(bits, min(bits + 3, _LEAST_BITS))
        self.n = n
        self._low_bits = np.uint64(bits - bits // 2)
        self._low = np.uint64((1 << (bits - bits // 2)) - 1)
        self._high = np.uint64((1 << (bits // 2)) - 1)
        self._key = word(key) if isinstance(key, int) else key

    def __call__(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Positions in [0, n), any shape -> their images, int64, same shape. IndexError for one outside."""
        x = np.asarray(positions, np.int64)
        if x.size and (x.min() < 0 or x.max() >= self.n):
            raise IndexError(f"positions must lie in [0, {self.n})")
        keys = np.broadcast_to(mix(self._key), x.shape)
        image = self._encipher(x.astype(np.uint64), keys)
        while (outside := image >= np.uint64(self.n)).any():
            image[outside] = self._encipher(image[outside], keys[outside])
        return image.astype(np.int64)

    def _encipher(self, x: NDArray[np.uint64], keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """One pass of the network over its whole power-of-two domain."""
        high, low = x >> self._low_bits, x & self._low
        for round in range(1, _ROUNDS + 1, 2):
            high = high ^ (mix(low + mix(keys + word(round * GOLDEN))) & self._high)
            low = low ^ (mix(high + mix(keys + word((round + 1) * GOLDEN))) & self._low)
        return (high << self._low_bits) | low


def epoch_keys(seed: int, epochs: NDArray[np.int64]) -> NDArray[np.uint64]:
    """The keys of the permutations of epochs (any shape, at least 1-d) -> uint64, same shape."""
    return counted(mix(word(seed)), epochs)


def samples_at(seed: int, positions: NDArray[np.int64], n: int) -> NDArray[np.int64]:
    """Window ids (same shape, int64, in [0, n)) at positions (>= 0) of the endless training sequence."""
    epochs, within = np.divmod(np.asarray(positions, np.int64), n)
    return Permutation(epoch_keys(seed, epochs), n)(within)


def samples_of_step(seed: int, step: int, global_batch: int, n: int) -> NDArray[np.int64]:
    """Window ids (global_batch,) int64 of an optimizer step, the same for any number of ranks and workers."""
    return samples_at(seed, step * global_batch + np.arange(global_batch, dtype=np.int64), n)


def epochs_of_step(step: int, global_batch: int, n: int) -> NDArray[np.int64]:
    """(global_batch,) int64: in which epoch, counted from 0, each window of an optimizer step is met."""
    return (step * global_batch + np.arange(global_batch, dtype=np.int64)) // n


def slots(turn: int, rank: int, world_size: int, micro_batch: int) -> slice:
    """Which slots of a global batch a rank takes in its micro batch number `turn` of that step."""
    first = (turn * world_size + rank) * micro_batch
    return slice(first, first + micro_batch)


@dataclass(frozen=True, eq=False)
class WindowPlan:
    """The windows of a split, numbered 0 .. n-1 in the order of the index.

    split: its name. length: bases per window.
    rows: (rows,) row in the index of each segment of the split.
    first: (rows + 1,) number of windows before each segment, skipped ones included ("raw" numbers).
    gapped, missing: (gapped windows,) sorted raw numbers of windows that hold non-letters, and how many.
    skips: (skipped windows,) for the i-th skipped raw number s_i, the value s_i - i: as many of these
        are <= id as there are skipped windows before window `id`.
    All int64.
    """

    split: str
    length: int
    rows: NDArray[np.int64]
    first: NDArray[np.int64]
    gapped: NDArray[np.int64]
    missing: NDArray[np.int64]
    skips: NDArray[np.int64]

    @classmethod
    def of(cls, segments: Segments, split: str, length: int, min_real: float = 0.5) -> "WindowPlan":
        """Plan the windows of `split` whose letters are at least `min_real` of `length`, and at least one.

        Raises DataError if there is none: the split is not there, no segment is long enough, or all have too
        few letters; and for a length below 1 or a min_real outside [0, 1].
        """
        if length < 1:
            raise DataError(f"data.length {length}: must be at least 1 base")
        if not 0 <= min_real <= 1:
            raise DataError(f"data.min_real {min_real}: must lie between 0 and 1")
        rows = segments.rows_of(split)
        first = np.concatenate([[0], np.cumsum(segments.length[rows] // length)])
        _check_lengths(segments, split, rows, length)
        gapped, missing = _gapped_windows(segments, rows, first, length)
        skipped = gapped[length - missing < max(min_real * length, 1)]
        plan = cls(split, length, rows, first, gapped, missing, skipped - np.arange(len(skipped)))
        if not len(plan):
            raise DataError(
                f"split {split!r}: none of its {first[-1]} windows of {length} bases has "
                f"{min_real:.0%} letters: lower data.min_real, or look at the input"
            )
        return plan

    def __len__(self) -> int:
        """n, the number of windows."""
        return int(self.first[-1]) - len(self.skips)

    def locate(self, ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Window ids (any shape) in [0, n) -> their row in the index, and first base within that segment."""
        raw = self._raw(ids)
        place = np.searchsorted(self.first, raw, side="right") - 1
        return self.rows[place], (raw - self.first[place]) * self.length

    def letters(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Window ids (any shape) in [0, n) -> letters in each, int64, known from the index alone."""
        raw = self._raw(ids)
        if not len(self.gapped):
            return np.full_like(raw, self.length)
        place = np.minimum(np.searchsorted(self.gapped, raw), len(self.gapped) - 1)
        return self.length - np.where(self.gapped[place] == raw, self.missing[place], 0)

    def _raw(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        ids = np.asarray(ids, np.int64)
        if ids.size and (ids.min() < 0 or ids.max() >= len(self)):
            raise IndexError(f"window ids of split {self.split!r} must lie in [0, {len(self)})")
        return ids + np.searchsorted(self.skips, ids, side="right")


def _check_lengths(segments: Segments, split: str, rows: NDArray[np.int64], length: int) -> None:
    """Raise DataError unless a segment of the split is at least `length` bases long."""
    if not len(rows):
        raise DataError(
            f"split {split!r} is not in the shards (they hold {', '.join(segments.splits())}): prepare them "
            f"with --{split}, or choose another split"
        )
    longest = rows[segments.length[rows].argmax()]
    if segments.length[longest] < length:
        raise DataError(
            f"split {split!r} has no window of data.length {length}: the longest part of a record in it, of "
            f"{segments.record[longest]!r}, has {segments.length[longest]} bases: lower data.length to "
            "that or prepare longer records"
        )


def _gapped_windows(
    segments: Segments, rows: NDArray[np.int64], first: NDArray[np.int64], length: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Sorted raw numbers of the windows that a gap touches, and the number of non-letters in each."""
    place_of_row = np.full(len(segments), -1)
    place_of_row[rows] = np.arange(len(rows))
    place = np.repeat(place_of_row, np.diff(segments.gap_bounds))
    gaps, place = segments.gaps[place >= 0], place[place >= 0]
    begin, end = gaps[:, 0], gaps.sum(axis=1)
    # A gap reaches from window `low` up to window `high`; the tail behind the last window has no number.
    low, high = begin // length, np.minimum(-(-end // length), np.diff(first)[place])
    counts = np.maximum(high - low, 0)
    each = np.repeat(np.arange(len(gaps)), counts)
    window = low[each] + np.arange(len(each)) - np.repeat(np.cumsum(counts) - counts, counts)
    missing = np.minimum(end[each], (window + 1) * length) - np.maximum(begin[each], window * length)
    numbers, starts = np.unique(first[place[each]] + window, return_index=True)
    return numbers, np.add.reduceat(missing, starts) if len(starts) else missing
