"""Random features of queries and keys (FAVOR+, Choromanski et al. 2021), and sums over them.

A feature is exp(exponent). All arithmetic here keeps exponents and units apart, so that no exponential overflows: a
"unit" is the exponent of the largest feature, and features are computed relative to it. Units cancel exactly in the
quotient that attention is, so no epsilon biases it.

Exponents and sums are fp32 (fp64 for fp64). Products are too, except for bf16 inputs, whose products are in bf16.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

CHUNK = 128
"""Positions whose features are in memory at once."""

FLOOR = -60.0
"""The least exponent of a key's feature within a chunk, relative to the key's largest. So a query's sum is above zero
even if its largest features are small in every key."""

NO_FEATURE = -1e30
"""The unit of an empty sum and the exponent of padding. Finite, so that differences are numbers."""


@lru_cache(maxsize=64)
def draw_directions(heads: int, features: int, d: int, seed: int, device: torch.device) -> Tensor:
    """Draw directions: each from N(0, I), in blocks of d that are orthogonal to each other.

    Orthogonal directions estimate without bias as well, with less variance (section 2.4). They are a function of the
    arguments, drawn on the CPU. The last results are cached: do not write into them.

    Returns:
        (heads, features, d) fp32 on `device`.
    """
    # The first caller may be in inference mode, and a later one may need the same tensor for its backward pass.
    with torch.inference_mode(False), torch.no_grad():
        generator = torch.Generator().manual_seed(seed)
        shape = (heads, -(-features // d), d, d)
        q, r = torch.linalg.qr(torch.randn(shape, generator=generator))
        # Q is uniformly distributed only if R's diagonal is positive, which LAPACK does not ensure.
        q = q * r.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]
        norms = torch.randn(shape, generator=generator).norm(dim=-1, keepdim=True)
        return (q.mT * norms).flatten(1, 2)[:, :features].contiguous().to(device)


class Features:
    """Exponents of features, (batch, heads, chunk, features) for a chunk of positions, and their gradients.

    Args:
        q, k: (batch, heads, length, d).
        directions: (heads, features, d).
        mask: (batch, length) bool, True where a key's position is real; None = all.
    """

    def __init__(self, q: Tensor, k: Tensor, directions: Tensor, mask: Tensor | None) -> None:
        self.q, self.k, self.mask = q, k, mask
        self.wide = torch.promote_types(q.dtype, torch.float32)
        self.narrow = torch.bfloat16 if q.dtype == torch.bfloat16 else self.wide
        # q · k / √d is a product of two vectors, each scaled by d^(−1/4). The directions are scaled instead of both.
        self.scale = q.shape[-1] ** -0.25
        self.directions = directions.to(self.wide) * self.scale

    def chunks(self) -> Iterator[slice]:
        """The chunks of positions, from the left."""
        length = self.q.shape[2]
        for start in range(0, length, CHUNK):
            yield slice(start, min(start + CHUNK, length))

    def empty(self, shape: tuple[int, ...]) -> Tensor:
        """An uninitialised tensor for exponents or sums."""
        return self.q.new_empty(shape, dtype=self.wide)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """a @ b in the dtype of products (see `_product`)."""
        return _product(self.narrow, a, b)

    def of_queries(self, part: slice) -> Tensor:
        """Exponents of queries: ω · q, without −|q|²/2, which cancels in the quotient."""
        return self.q[:, :, part].to(self.wide) @ self.directions.mT

    def of_keys(self, part: slice) -> Tensor:
        """Exponents of keys: ω · k − |k|²/2, or NO_FEATURE for a position that is not real."""
        k = self.k[:, :, part].to(self.wide)
        exponents = (k @ self.directions.mT).sub_(k.square().sum(-1, keepdim=True), alpha=0.5 * self.scale**2)
        return exponents if self.mask is None else exponents.masked_fill_(self._padding(part), NO_FEATURE)

    def in_units(self, exponents: Tensor, unit: Tensor, part: slice) -> Tensor:
        """Features of keys, divided by exp(unit); zero for a position that is not real."""
        features = (exponents - unit).exp_()
        return features if self.mask is None else features.masked_fill_(self._padding(part), 0.0)

    def to_queries(self, grad: Tensor) -> Tensor:
        """The gradient of queries, from that of their exponents."""
        return grad @ self.directions

    def to_keys(self, grad: Tensor, part: slice) -> Tensor:
        """The gradient of keys, from that of their exponents."""
        k = self.k[:, :, part].to(self.wide)
        return (grad @ self.directions).sub_(k * grad.sum(-1, keepdim=True), alpha=self.scale**2)

    def _padding(self, part: slice) -> Tensor:
        assert self.mask is not None
        return ~self.mask[:, None, part, None]


@dataclass(frozen=True)
class PairsInChunk:
    """The pairs of queries and keys within one chunk.

    The weight of key j for query i is exp(level_i) · units_ij · Σ_f queries_if · keys_jf. No row depends on a later
    position.

    Attributes:
        queries, keys: (batch, heads, chunk, features), each divided by its own largest feature.
        units: (batch, heads, chunk, chunk), at most 1: the largest feature of the key divided by the largest of all
            keys that the query sees; 0 for later keys.
        level: (batch, heads, chunk, 1).
    """

    queries: Tensor
    keys: Tensor
    units: Tensor
    level: Tensor

    @classmethod
    def of(cls, features: Features, queries: Tensor, keys: Tensor, part: slice) -> PairsInChunk:
        """From the exponents of queries and keys, (batch, heads, chunk, features)."""
        top_queries, top_keys = queries.amax(-1, keepdim=True), keys.amax(-1, keepdim=True)
        seen = top_keys.cummax(-2).values
        return cls(
            (queries - top_queries).exp_(),
            features.in_units(torch.maximum(keys, top_keys + FLOOR), top_keys, part),
            (top_keys.mT - seen).clamp_max_(0.0).exp_().tril_(),
            top_queries.add_(seen),
        )


class FeatureSums:
    """Sums over positions of feature · value and of feature · 1, divided by exp(unit).

    Attributes:
        unit, ones: (batch, heads, 1, features).
        values: (batch, heads, features, d).
    """

    def __init__(self, features: Features, v: Tensor) -> None:
        self.narrow = features.narrow
        shape = (*v.shape[:2], 1, features.directions.shape[1])
        self.unit = torch.full(shape, NO_FEATURE, dtype=features.wide, device=v.device)
        self.ones = torch.zeros_like(self.unit)
        self.values = features.empty((*v.shape[:2], shape[-1], v.shape[-1])).zero_()

    def fork(self, sequences: Tensor) -> FeatureSums:
        """A copy for some of the sequences, given by their numbers (n,) int64."""
        fork = copy.copy(self)
        fork.unit = self.unit.index_select(0, sequences)
        fork.ones = self.ones.index_select(0, sequences)
        fork.values = self.values.index_select(0, sequences)
        return fork

    def rescale(self, unit: Tensor) -> None:
        """Change the unit to one that is not smaller."""
        shrink = (self.unit - unit).exp_()
        self.ones *= shrink
        self.values *= shrink.mT
        self.unit = unit

    def add_keys(self, features: Features, exponents: Tensor, values: Tensor, part: slice) -> None:
        """Add the keys and values of a chunk. The unit becomes the largest exponent so far."""
        self.rescale(torch.maximum(self.unit, exponents.amax(-2, keepdim=True)))
        self.add(features.in_units(exponents, self.unit, part), values, 1.0)

    def add(self, features: Tensor, values: Tensor, one: Tensor | float) -> None:
        """Add positions: features (..., chunk, features) times values (..., chunk, d), and times `one`."""
        self.ones += (features * one).sum(-2, keepdim=True)
        self.values += _product(self.narrow, features.mT, values)

    def read(self, values: Tensor, one: Tensor | float) -> Tensor:
        """values (..., chunk, d) · the sums of values − one · the sums of ones: (..., chunk, features)."""
        return _product(self.narrow, values, self.values.mT).sub_(self.ones * one)


def _product(narrow: torch.dtype, a: Tensor, b: Tensor) -> Tensor:
    """a @ b computed in `narrow`, and returned in fp32, or fp64 where that is fp64."""
    return (a.to(narrow) @ b.to(narrow)).to(torch.promote_types(narrow, torch.float32))
