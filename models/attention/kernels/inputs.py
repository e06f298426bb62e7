"""What every kernel takes besides q, k and v: the sorted order, the rule, dropout; and the rotations of the hash.

    sorted_attention(q, k, v, order, rule, dropout) -> out

q and k have shape (rows, length, d), v and out (rows, length, d_v), with rows = batch × heads. Scores are q · k: the
caller scales keys first. (`native` differs: it takes (batch, heads, length, d), and scales keys itself.)

Terms: a *position* is an index into the sequence. A *slot* is an index into the sorted sequence, in which positions of
one bucket lie side by side. Every round of hashing has a sorted sequence of its own.
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
    """Which keys a query attends to, given the sorted order.

    Attributes:
        reach: How far a query sees, in slots; see `attend`.
        attend: `window`: in each round, the `reach` slots before the query's own that hold its bucket (not causal:
            also the `reach` slots after it). `chunk`: the sorted sequence is cut into chunks of `reach` slots, and a
            query attends to its own chunk and the one before (paper, section 2). The chunk before the first one of a
            round is the last one of the round before; before round 0 comes the last round. So do trax and
            transformers.
        causal: A query attends to no later position.
        once: A key found in several rounds counts once. Otherwise it counts once for each round.
        own: Whether a position attends to its own key. `always`: its own key is a key like any other. `alone`: only
            if it attends to nothing else. So it is in the paper (section 2), where queries are keys too, so that every
            position would attend mostly to itself. (trax and transformers give that pair a score of about −1e5
            instead.) `never`: a position that attends to nothing else outputs zero.
    """

    reach: int
    attend: str
    causal: bool
    once: bool
    own: str

    @property
    def excludes_own(self) -> bool:
        """Whether a position's own key is not among those that it attends to."""
        return self.own != "always"


@dataclass(frozen=True)
class SortedOrder:
    """The positions of every row in every round, sorted by (bucket, position).

    Positions that are not real (padding) fill the last slots of each round. They attend to nothing, nothing attends
    to them, and their output is zero.

    Attributes:
        positions: (rows, rounds, length) int32 or int64, the position in each slot.
        buckets: (rows, rounds, length) of any integer dtype, the bucket of the position in each slot.
        real_lengths: (rows,) int32, how many positions are real.
        key_scales: (rows, length) fp32, the factors that make unit keys of the vectors that were hashed; None if the
            hash did not compute them. Valid for queries that are these vectors.
    """

    positions: Tensor
    buckets: Tensor
    real_lengths: Tensor
    key_scales: Tensor | None = None

    @cached_property
    def slots(self) -> Tensor:
        """(rows, rounds, length) int32, the slot of each position: the inverse of `positions`."""
        numbers = torch.arange(self.positions.shape[-1], dtype=torch.int32, device=self.positions.device)
        slots = torch.empty(self.positions.shape, dtype=torch.int32, device=self.positions.device)
        return slots.scatter_(-1, self.positions.long(), numbers.expand_as(slots))

    @classmethod
    def by_bucket(cls, buckets: Tensor, mask: Tensor | None = None) -> SortedOrder:
        """Sort by bucket.

        Args:
            buckets: (rows, rounds, length) integers in [0, 2^31 − 1).
            mask: (rows, length) bool, True where a position is real; None if all are.
        """
        if mask is not None:
            buckets = buckets.masked_fill(~mask[:, None], torch.iinfo(torch.int32).max)
        sorted_buckets, positions = torch.sort(buckets, dim=-1, stable=True)
        return cls(positions.to(torch.int32), sorted_buckets.to(torch.int32), cls.count_real(mask, buckets))

    @classmethod
    def identity(cls, rows: int, length: int, device: torch.device) -> SortedOrder:
        """One round with one bucket: every position is in the slot of its own number."""
        numbers = torch.arange(length, dtype=torch.int32, device=device).expand(rows, 1, length)
        buckets = torch.zeros(1, dtype=torch.int32, device=device).expand(rows, 1, length)
        order = cls(numbers, buckets, torch.full((rows,), length, dtype=torch.int32, device=device))
        vars(order)["slots"] = numbers  # the permutation is its own inverse
        return order

    @staticmethod
    def count_real(mask: Tensor | None, buckets: Tensor) -> Tensor:
        """`real_lengths` for buckets (rows, rounds, length) and their mask (rows, length); None: all are real."""
        rows, _, length = buckets.shape
        if mask is None:
            return torch.full((rows,), length, dtype=torch.int32, device=buckets.device)
        return mask.sum(-1, dtype=torch.int32)


@dataclass(frozen=True)
class PairDropout:
    """Dropout of attention weights, as a function of (row, query position, key position).

    So a pair is dropped or kept alike in every round and in every kernel.

    Attributes:
        rate: Share of the weights that become 0, in [0, 1).
        keys: (rows,) int64 keys of `megabase.models.chance.random_bits`.
    """

    rate: float
    keys: Tensor

    def scale(self, row: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Factors of attention weights: 1 / (1 − rate) for a pair that is kept, else 0; fp32.

        Args:
            row: Integers that index `keys`.
            query: Positions of queries.
            key: Positions of keys. The three shapes broadcast.
        """
        bits = random_bits(self.keys[row], query.to(torch.int32))
        bits = random_bits(self.keys[row], bits ^ key.to(torch.int32))
        return keep(bits, self.rate) * (1.0 / (1.0 - self.rate))


def row_mask(mask: Tensor | None, heads: int) -> Tensor | None:
    """The mask (batch, length) for rows: (batch × heads, length)."""
    return None if mask is None else mask.repeat_interleave(heads, dim=0)


@dataclass(frozen=True)
class Rotations:
    """The random matrices R of the hash h(x) = argmax([xR, −xR]), for every round and head (paper, section 2).

    A hash into many buckets is made of several factors, each with an R of its own.

    Attributes:
        table: (rounds, heads, d, columns) of any float dtype: R of all factors side by side.
        halves: Columns of each factor. A factor of n columns tells 2n buckets apart.
    """

    table: Tensor
    halves: tuple[int, ...]

    def of_heads(self, heads: slice) -> Rotations:
        """The rotations of some of the heads."""
        return self if heads == slice(None) else Rotations(self.table[:, heads].contiguous(), self.halves)

    @property
    def rounds(self) -> int:
        """How many rounds of hashing there are."""
        return self.table.shape[0]

    @property
    def n_buckets(self) -> int:
        """Buckets of one round."""
        return math.prod(2 * half for half in self.halves)

    def factors(self, number: int) -> tuple[Tensor, ...]:
        """R (heads, d, half) of each factor of round `number`, fp32."""
        return self.table[number].float().split(self.halves, dim=-1)
