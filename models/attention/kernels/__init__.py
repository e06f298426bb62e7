"""Kernels: the same function, `meet`, computed in different ways.

    meet(q, k, v, seating, rule, dropout) -> out

q, k: (rows, length, d), v: (rows, length, d_v), out like v; rows = batch × heads. k is scaled already: a score is
q · k. `reference` is the readable truth; `chunked` streams through torch's own operations, and runs everywhere;
`native` is fused C++ for CPUs (it takes rows apart into batch and heads, and scales keys itself); `triton` is for
GPUs. `dispatch` chooses, and is what layers call.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from megabase.models.chance import keep, random_bits


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

    order: (rows, rounds, length) int32, the position in each seat.
    buckets: (rows, rounds, length) int32, the bucket of the position in each seat.
    real: (rows,) int32, how many positions are real. The others sit at the end, meet nobody and are met by
        nobody; their output is zero.
    """

    order: Tensor
    buckets: Tensor
    real: Tensor

    @cached_property
    def rank(self) -> Tensor:
        """(rows, rounds, length) int32, the inverse of order: the seat of each position."""
        seats = torch.arange(self.order.shape[-1], dtype=torch.int32, device=self.order.device)
        rank = torch.empty(self.order.shape, dtype=torch.int32, device=self.order.device)
        return rank.scatter_(-1, self.order.long(), seats.expand_as(rank))

    @classmethod
    def by_bucket(cls, buckets: Tensor, mask: Tensor | None = None) -> Seating:
        """Seats for buckets (rows, rounds, length), integers in [0, 2^31 − 1); mask: (rows, length) bool, True where
        a position is real."""
        if mask is not None:
            buckets = buckets.masked_fill(~mask[:, None], torch.iinfo(torch.int32).max)
        seated, order = torch.sort(buckets, dim=-1, stable=True)
        return cls(order.to(torch.int32), seated.to(torch.int32), cls.count(mask, buckets))

    @classmethod
    def in_order(cls, rows: int, length: int, device: torch.device) -> Seating:
        """One round, one bucket, nothing sorted: every position on the seat of its own number."""
        seats = torch.arange(length, dtype=torch.int32, device=device).expand(rows, 1, length)
        nowhere = torch.zeros(1, dtype=torch.int32, device=device).expand(rows, 1, length)
        seating = cls(seats, nowhere, torch.full((rows,), length, dtype=torch.int32, device=device))
        vars(seating)["rank"] = seats  # its own inverse
        return seating

    @staticmethod
    def count(mask: Tensor | None, buckets: Tensor) -> Tensor:
        """`real` for buckets (rows, rounds, length) and their mask (rows, length), None if all positions are real."""
        rows, _, length = buckets.shape
        if mask is None:
            return torch.full((rows,), length, dtype=torch.int32, device=buckets.device)
        return mask.sum(-1, dtype=torch.int32)


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


def row_mask(mask: Tensor | None, heads: int) -> Tensor | None:
    """(batch, length) -> (batch × heads, length)."""
    return None if mask is None else mask.repeat_interleave(heads, dim=0)


@dataclass(frozen=True)
class Rotations:
    """R of every round, head and factor of the hash h(x) = argmax([xR, −xR]).

    table: (rounds, heads, d, columns), any float dtype, the factors side by side; halves: columns of each, half as many
    as the sectors that it tells apart.
    """

    table: Tensor
    halves: tuple[int, ...]

    @property
    def rounds(self) -> int:
        return self.table.shape[0]

    @property
    def n_buckets(self) -> int:
        """Of a round."""
        return math.prod(2 * half for half in self.halves)

    def factors(self, number: int) -> tuple[Tensor, ...]:
        """R (heads, d, half) of each factor of a round, fp32."""
        return self.table[number].float().split(self.halves, dim=-1)
