"""Kernels: the same function, `meet`, computed in different ways.

    meet(q, k, v, seating, rule, dropout) -> out

q, k: (rows, length, d), v: (rows, length, d_v), out like v; rows = batch × heads. k is scaled already: a score is
q · k. `reference` is the readable truth; `chunked` streams, and keeps O(length) memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from models.chance import keep, random_bits


@dataclass(frozen=True)
class Rule:
    """Who meets whom, given the seats.

    reach: `window`: in each round the `reach` seats before a position's own that belong to its bucket (not
        causal: and as many after it). `chunk`: the positions of its own chunk of `reach` seats and of the chunk
        before, the first chunk of a round following the last of the round before (and that of round 0 the very
        last): the ring of trax and transformers.
    attend: `window` or `chunk`.
    causal: a position meets none after it.
    once: a key met in several rounds counts once; else as often as it is met.
    shared: queries are keys, so that a position would see little but itself: it meets itself only where it
        meets nothing else (paper, section 2; the references' score of −1e5, in the limit). Else it meets itself
        like any other.
    """

    reach: int
    attend: str
    causal: bool
    once: bool
    shared: bool


@dataclass(frozen=True)
class Seating:
    """Where every position sits in every round: sorted by (bucket, position).

    order: (rows, rounds, length) int64, the position in each seat. rank: the inverse, the seat of each position.
    buckets: (rows, rounds, length) int64, the bucket of the position in each seat.
    real: (rows,) int64, how many positions are real. The others sit at the end, meet nobody and are met by
        nobody; their output is zero.
    """

    order: Tensor
    rank: Tensor
    buckets: Tensor
    real: Tensor

    @classmethod
    def by_bucket(cls, buckets: Tensor, mask: Tensor | None = None) -> Seating:
        """Seats for buckets (rows, rounds, length); mask: (rows, length) bool, True where a position is real."""
        rows, _, length = buckets.shape
        if mask is not None:
            buckets = buckets.masked_fill(~mask[:, None], torch.iinfo(torch.int64).max)
        seated, order = torch.sort(buckets, dim=-1, stable=True)
        seats = torch.arange(length, device=buckets.device).expand_as(order)
        rank = torch.empty_like(order).scatter_(-1, order, seats)
        real = torch.full((rows,), length, device=buckets.device) if mask is None else mask.sum(-1)
        return cls(order, rank, seated, real)


@dataclass(frozen=True)
class PairDropout:
    """Dropout of attention weights: what happens to a pair is a function of (row, query, key), whatever the
    round and the seats. keys: (rows,) int64; rate in [0, 1)."""

    rate: float
    keys: Tensor

    def scale(self, row: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """1 / (1 − rate) where the weight of query (position) for key (position) is kept, else 0; fp32.

        row indexes `keys`. All three are integers, of shapes that broadcast.
        """
        bits = random_bits(self.keys[row], query.to(torch.int32))
        bits = random_bits(self.keys[row], bits ^ key.to(torch.int32))
        return keep(bits, self.rate) * (1.0 / (1.0 - self.rate))
