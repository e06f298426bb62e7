"""Randomness as a function, in numpy: hashes numbers to random 64-bit words, so that no generator state is kept.

The hash is the finaliser of splitmix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators",
OOPSLA 2014).
"""

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

GOLDEN = 0x9E3779B97F4A7C15
"""2^64 / golden ratio, the increment of splitmix64: its multiples are far apart."""

_VISITS = 0x5851F42D4C957F2D


class Purpose(IntEnum):
    """What a random word is for. Words of different purposes are independent."""

    SHIFT = 0xA3EC647659359ACD
    STRAND = 0xD1342543DE82EF95
    MIXTURE = 0xAF251AF3B0F025B5
    GROUP = 0x9FB21C651E98DF25
    LETTERS = 0xC2B2AE3D27D4EB4F
    CHANGES = 0x165667B19E3779F9
    MASKS = 0x27D4EB2F165667C5


def mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A bijection of 64-bit words in which every input bit changes about half of the output bits."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def word(value: int) -> NDArray[np.uint64]:
    """An integer modulo 2^64 as an array of one element: numpy wraps arrays silently, and warns about scalars."""
    return np.array([value % (1 << 64)], np.uint64)


def counted(keys: NDArray[np.uint64], counters: NDArray[np.int64]) -> NDArray[np.uint64]:
    """One random word for every (key, counter); shapes broadcast, counters are taken modulo 2^64."""
    return mix(keys + counters.astype(np.uint64) * np.uint64(GOLDEN))


def derived(keys: NDArray[np.uint64], purpose: Purpose) -> NDArray[np.uint64]:
    """One random word for every key (any shape, at least 1-d), independent of other purposes and of `counted`."""
    return mix(keys ^ word(purpose))


def uniform(words: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Random words -> numbers in [0, 1), from their upper 53 bits."""
    return np.asarray((words >> np.uint64(11)) * 2.0**-53, np.float64)


def visit_keys(seed: int, epochs: NDArray[np.int64], samples: NDArray[np.int64]) -> NDArray[np.uint64]:
    """The keys of all randomness in a visit of a window: one for every (seed, epoch, window id).

    Args:
        seed: any integer.
        epochs: (batch,) int64.
        samples: (batch,) int64 window ids.

    Returns:
        (batch,) uint64, independent of the keys of the order.
    """
    return counted(counted(mix(word(seed) ^ word(_VISITS)), epochs), samples)
