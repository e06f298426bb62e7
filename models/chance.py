"""Chance as a function: every random number of a pass follows from (run, step, layer, purpose, sample).

No generator keeps a history: a random number is a counter hashed with a key. Numbers of a layer (hash rotations) have
a key that is a hash of (run, step, purpose, layer). Numbers of a sample (dropout) have a key that is a hash of these
and of the sample's id. So the numbers are the same on any rank, in any micro batch, before and after a restart, in the
forward pass and when the backward pass repeats it, on a CPU and on a GPU.

Two hash functions are used: the finaliser of splitmix64 (Steele, Lea & Flood 2014) for keys, and a 32-bit function of
the same kind (Wellons, "lowbias32") for the numbers.
"""

from __future__ import annotations

import enum
import functools
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from megabase.models import fused

Word = TypeVar("Word", int, Tensor)
"""64 bits, as a signed integer or as an int64 tensor of any shape."""

GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
"""2^64 / golden ratio: splitmix64's step from one counter to the next."""

MIX_1, MIX_2 = 0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64)
"""The factors of splitmix64's finaliser."""


@enum.unique
class Purpose(enum.IntEnum):
    """What a random number is for. Numbers of different purposes are independent."""

    HASH = 1
    EMBEDDING = 2
    ATTENTION = 3
    ATTENTION_WEIGHTS = 4
    FEEDFORWARD = 5
    CROSS = 6
    CROSS_WEIGHTS = 7
    DECODER = 8
    SAMPLING = 9
    CLASSIFIER = 10
    FEATURES = 11


@dataclass(frozen=True)
class Seeds:
    """The source of all random numbers of one pass.

    Attributes:
        run: the run's seed.
        step: the optimizer step.
        samples: (batch,) int64 ids of the sequences, the same on any rank; None numbers the rows 0, 1, ...
    """

    run: int = 0
    step: int = 0
    samples: Tensor | None = None

    def number(self, purpose: Purpose, layer: int) -> int:
        """A seed in [0, 2^63) for a layer and the step, the same for all samples."""
        state = 0
        for word in (self.run, self.step, int(purpose), layer):
            state = _mix(_wrap(state + GOLDEN + word))
        return _shift(state, 1)

    def apart(self, purpose: Purpose) -> Seeds:
        """Seeds for a part of the model that numbers its layers from 0 again, such as a decoder."""
        return replace(self, run=self.number(purpose, 0))

    def keys(self, purpose: Purpose, layer: int, batch: int, device: torch.device) -> Tensor:
        """One key for each sample.

        Args:
            purpose: what the numbers are for.
            layer: the layer that the numbers belong to.
            batch: number of samples.
            device: the device of the result.

        Returns:
            (batch,) int64, for `random_bits` and `dropout`.

        Raises:
            ValueError: `samples` has another shape than (batch,).
        """
        if self.samples is None:
            samples = torch.arange(batch, device=device)
        elif self.samples.shape == (batch,):
            samples = self.samples.to(device)
        else:
            shape = tuple(self.samples.shape)
            raise ValueError(
                f"Seeds.samples has shape {shape}, but the batch holds {batch} sequences: give one id for each"
            )
        return _mix(samples * GOLDEN + self.number(purpose, layer))


def random_bits(keys: Tensor, counters: Tensor) -> Tensor:
    """Uniform random int32, one for every pair of key and counter.

    Counters are hashed with both halves of the key, so the numbers of different keys are independent.

    Args:
        keys: int64.
        counters: int32, of a shape that broadcasts with that of `keys`.
    """
    bits = counters + keys.to(torch.int32)
    bits ^= (bits >> 16).bitwise_and_(0xFFFF)
    bits *= 0x7FEB352D
    bits += (keys >> 32).to(torch.int32)
    bits ^= (bits >> 15).bitwise_and_(0x1FFFF)
    bits *= 0x846CA68B - (1 << 32)
    bits ^= (bits >> 16).bitwise_and_(0xFFFF)
    return bits


def normals(key: int, n: int, device: torch.device | None = None) -> Tensor:
    """Draw from N(0, 1): the hash of a counter chooses one of 2^16 quantiles. The same on every device.

    Args:
        key: 64 bits.
        n: how many numbers.
        device: the device of the result; None = CPU.

    Returns:
        (n,) bf16.
    """
    key = _wrap(key)
    table = _quantiles(torch.device("cpu") if device is None else device)
    if fused.supports(table):
        return fused.normals(key, n, table)
    counters = torch.arange(n, dtype=torch.int32, device=table.device)
    bits = random_bits(torch.tensor(key, device=table.device), counters)
    return table[(bits >> 16).bitwise_and_(0xFFFF)]


@functools.cache
def _quantiles(device: torch.device) -> Tensor:
    """The medians of 2^16 equally likely parts of N(0, 1): (2^16,) bf16, ascending."""
    with torch.inference_mode(False):
        middles = (torch.arange(1 << 16, dtype=torch.float64) + 0.5) / (1 << 16)
        return torch.special.ndtri(middles).to(torch.bfloat16).to(device)


def keep(bits: Tensor, rate: float) -> Tensor:
    """Which of the random `bits` (int32) are kept: bool of their shape, False with probability `rate`."""
    return bits >= round(rate * 2.0**32) - (1 << 31)


def dropout(x: Tensor, rate: float, keys: Tensor, start: int = 0) -> Tensor:
    """Dropout. Whether an element is kept is a function of its sample's key and its place in the sample.

    Args:
        x: (batch, length, ...).
        rate: probability that an element becomes 0, in [0, 1); the others are scaled by 1 / (1 − rate).
        keys: (batch,) int64.
        start: positions of the sample before the first one of x.
    """
    if rate == 0.0:
        return x
    first = start * x[0, 0].numel() if start else 0
    if fused.supports(x):
        return fused.dropout(x, rate, keys, first)
    kept = keep(_bits_of_places(keys, first, x[0].numel()), rate).view_as(x)
    return x * (kept * (1.0 / (1.0 - rate))).to(x.dtype)


def _bits_of_places(keys: Tensor, first: int, n: int) -> Tensor:
    """Random bits of n places from `first` on, for each key: (batch, n) int32.

    A counter has 32 bits. A place's bits above these change the key: places that are 2^32 apart are independent.
    """
    places = torch.arange(first, first + n, device=keys.device)
    counters = places.to(torch.int32)  # the lowest 32 bits
    if first + n > 1 << 32:
        return random_bits(keys[:, None] ^ ((places >> 32) * GOLDEN)[None], counters[None])
    return random_bits(keys[:, None], counters[None])


def _mix(word: Word) -> Word:
    """The finaliser of splitmix64: a bijection in which every bit of the result depends on every bit of the word."""
    word = _wrap((word ^ _shift(word, 30)) * MIX_1)
    word = _wrap((word ^ _shift(word, 27)) * MIX_2)
    return word ^ _shift(word, 31)


def _shift(word: Word, bits: int) -> Word:
    """Shift 64 bits to the right and fill with zeros from the left, where >> alone would repeat the sign bit."""
    return (word >> bits) & ((1 << (64 - bits)) - 1)


def _wrap(word: Word) -> Word:
    """The lowest 64 bits as a signed integer. Tensors wrap on their own."""
    return word if isinstance(word, Tensor) else (word + (1 << 63)) % (1 << 64) - (1 << 63)
