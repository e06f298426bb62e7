"""Chance as a function: every random number of a pass follows from (run, step, layer, purpose, sample).

No generator has a history here: a number is a counter hashed with a key. Keys of numbers that belong to a layer (hash
rotations) are mixed out of (run, step, purpose, layer); of those that belong to a sample (dropout) out of these and the
sample's id. So they are the same on whatever rank, in whatever micro batch, before and after a restart, in the forward
pass and when the backward pass rebuilds it, on a CPU and on a GPU.

The mixing functions are splitmix64's finaliser (Steele, Lea & Flood 2014) and a 32-bit one of the same make
(Wellons, "lowbias32").
"""

from __future__ import annotations

import enum
import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megabase.models import fused

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


@enum.unique
class Purpose(enum.IntEnum):
    """What a random number is for: two purposes never share one."""

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
    """Where all chance of one pass comes from.

    run: the run's seed. step: the optimizer step. samples: (batch,) int64 ids of the sequences, whatever rank
    they are on; None numbers the rows 0, 1, ...
    """

    run: int = 0
    step: int = 0
    samples: Tensor | None = None

    def number(self, purpose: Purpose, layer: int) -> int:
        """A seed in [0, 2^63) that belongs to the layer and step, the same for all samples."""
        state = 0
        for word in (self.run, self.step, int(purpose), layer):
            state = _mix((state + _GOLDEN + word) & _MASK)
        return state >> 1

    def apart(self, purpose: Purpose) -> Seeds:
        """Seeds for a part of a model whose layers are counted from 0 again, such as a decoder."""
        return replace(self, run=self.number(purpose, 0))

    def keys(self, purpose: Purpose, layer: int, batch: int, device: torch.device) -> Tensor:
        """(batch,) int64 keys, one for each sample, for `random_bits`. Raises ValueError if ids are missing."""
        if self.samples is None:
            samples = torch.arange(batch, device=device)
        elif self.samples.shape == (batch,):
            samples = self.samples.to(device)
        else:
            shape = tuple(self.samples.shape)
            raise ValueError(
                f"Seeds.samples has shape {shape}, but the batch holds {batch} sequences: one id each"
            )
        key = samples * _signed(_GOLDEN) + _signed(self.number(purpose, layer))
        key = (key ^ _shifted(key, 30)) * _signed(_MIX_1)
        key = (key ^ _shifted(key, 27)) * _signed(_MIX_2)
        return key ^ _shifted(key, 31)


def random_bits(keys: Tensor, counters: Tensor) -> Tensor:
    """Uniform int32 for every (key, counter).

    keys: int64, counters: int32; of shapes that broadcast. Counters are hashed together with both halves of
    the key, so streams of different keys do not overlap.
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
    """n numbers of N(0, 1) in bf16, the same on every device: 2^16 quantiles, chosen by hashing. key: 64 bits."""
    key = _signed(key & _MASK)
    table = _quantiles(torch.device("cpu") if device is None else device)
    if fused.supports(table):
        return fused.normals(key, n, table)
    counters = torch.arange(n, dtype=torch.int32, device=table.device)
    bits = random_bits(torch.tensor(key, device=table.device), counters)
    return table[(bits >> 16).bitwise_and_(0xFFFF)]


@functools.cache
def _quantiles(device: torch.device) -> Tensor:
    """The 2^16 numbers that cut N(0, 1) into equal parts, each in the middle of its part: bf16, ascending."""
    with torch.inference_mode(False):
        middles = (torch.arange(1 << 16, dtype=torch.float64) + 0.5) / (1 << 16)
        return torch.special.ndtri(middles).to(torch.bfloat16).to(device)


def keep(bits: Tensor, rate: float) -> Tensor:
    """Bool of the bits' shape: False with probability `rate`, in steps of 2^-32."""
    return bits >= round(rate * 2.0**32) - (1 << 31)


def dropout(x: Tensor, rate: float, keys: Tensor) -> Tensor:
    """Dropout of x (batch, ...) with one key (int64) for each of the batch; kept values are scaled up.

    The mask of an element is a function of its sample's key and its place in the sample alone.
    """
    if rate == 0.0:
        return x
    if fused.supports(x):
        return fused.dropout(x, rate, keys)
    n = x[0].numel()
    counters = torch.arange(n, dtype=torch.int32, device=x.device)
    kept = keep(random_bits(keys[:, None], counters[None]), rate).view_as(x)
    return x * (kept * (1.0 / (1.0 - rate))).to(x.dtype)


def _mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * _MIX_1) & _MASK
    z = ((z ^ (z >> 27)) * _MIX_2) & _MASK
    return z ^ (z >> 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """int64 shifted to the right without its sign: torch's own shift repeats the sign bit."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(z: int) -> int:
    """The int64 with the bits of `z`."""
    return z - (1 << 64) if z >> 63 else z
