"""In which order windows are met: a function of (seed, step, global batch), computed at the positions asked for.

Position p = step * global_batch + slot of an endless sequence. With one group of windows, every n positions (an
epoch) are a keyed permutation of the n windows. With a mixture of groups, positions come in cycles of `CYCLE`, in
which each group has its exact share, at places that a keyed permutation of the cycle chooses; what a group is
asked for is an endless sequence of its own, with epochs and permutations of its own. Nothing is shuffled in memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from megabase.datamodules.errors import DataError
from megabase.datamodules.order.hashing import GOLDEN, Purpose, counted, derived, mix, word

CYCLE = 1024
"""Positions in which a mixture is exact."""

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


@dataclass(frozen=True)
class Order:
    """The endless training sequence over groups of windows.

    seed: any integer. bounds: (groups + 1,) window ids; group g is [bounds[g], bounds[g + 1]), at least one window.
    weights: of each group, above 0, in any unit; ignored with one group.
    """

    seed: int
    bounds: tuple[int, ...]
    weights: tuple[float, ...] = (1.0,)

    def of_step(self, step: int, global_batch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Window ids and epochs (global_batch,) of an optimizer step, whatever the ranks and workers."""
        return self.at(step * global_batch + np.arange(global_batch, dtype=np.int64))

    def at(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Positions (>= 0, any shape) -> window ids, and how often each window had its turn before; same shape."""
        if len(self.weights) == 1:
            first, end = self.bounds
            epochs, within = np.divmod(np.asarray(positions, np.int64), end - first)
            return first + Permutation(epoch_keys(self.seed, epochs), end - first)(within), epochs
        cycles, slots = np.divmod(np.asarray(positions, np.int64), CYCLE)
        seed = derived(word(self.seed), Purpose.MIXTURE)
        dealt = Permutation(counted(seed, cycles), CYCLE)(slots)
        quotas = np.array(self.quotas)
        ends = np.cumsum(quotas)
        group = np.searchsorted(ends, dealt, side="right")
        turns = cycles * quotas[group] + dealt - (ends - quotas)[group]
        samples, epochs = np.empty_like(turns), np.empty_like(turns)
        for number in np.unique(group):
            mine = group == number
            samples[mine], epochs[mine] = self._alone(int(number)).at(turns[mine])
        return samples, epochs

    @cached_property
    def quotas(self) -> tuple[int, ...]:
        """Positions of each group in a cycle."""
        return quotas_of(self.weights)

    def _alone(self, group: int) -> "Order":
        """The sequence that a group is met in."""
        seed = counted(derived(word(self.seed), Purpose.GROUP), np.array([group]))
        return Order(int(seed[0]), self.bounds[group : group + 2])


def quotas_of(weights: Sequence[float]) -> tuple[int, ...]:
    """Positions in a cycle of groups with weights above 0: their shares of `CYCLE`, by largest remainder.

    Raises DataError if a group is left without any.
    """
    shares = np.array(weights) / sum(weights) * CYCLE
    quotas = np.floor(shares).astype(np.int64)
    quotas[np.argsort(quotas - shares, kind="stable")[: CYCLE - int(quotas.sum())]] += 1
    if not quotas.all():
        least = weights[int(quotas.argmin())]
        raise DataError(
            f"data.mixture: weight {least:g} is less than 1/{CYCLE} of all weights: raise it, or set it to 0"
        )
    return tuple(quotas.tolist())


def epoch_keys(seed: int, epochs: NDArray[np.int64]) -> NDArray[np.uint64]:
    """The keys of the permutations of epochs (any shape, at least 1-d) -> uint64, same shape."""
    return counted(mix(word(seed)), epochs)


def samples_of_step(seed: int, step: int, global_batch: int, n: int) -> NDArray[np.int64]:
    """Window ids (global_batch,) int64 of an optimizer step over one group of n windows."""
    return Order(seed, (0, n)).of_step(step, global_batch)[0]


def slots(turn: int, rank: int, world_size: int, micro_batch: int) -> slice:
    """Which slots of a global batch a rank takes in its micro batch number `turn` of that step."""
    first = (turn * world_size + rank) * micro_batch
    return slice(first, first + micro_batch)
