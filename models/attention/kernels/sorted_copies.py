"""What `chunked` computes with: sorted copies of q, k, v in blocks and spans, and which pairs count.

Terms, beside those of `inputs`. A *block* is a run of slots whose queries are computed together. Its *span* is
the slots of the keys that these queries can reach: `before` slots, the block itself, `after` slots. The *ring* of the
rule `chunk` joins the rounds: the first chunk of a round attends to the last chunk of the round before. So every row
begins with a copy of that chunk, in `ring` extra slots.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megabase.models.attention.kernels.inputs import PairDropout, Rule, SortedOrder
from megabase.models.checks import round_up

EXCLUDED = -1e30
"""Score of a pair that does not count: finite, so that a row of them makes no NaN."""


class Layout:
    """How the slots of some rows are cut into blocks and spans, the same in every round.

    Rows lie end to end. Each has `ring` slots for the ring's chunk (rule `chunk` only), then its own slots, padded to
    whole blocks: `row_slots` in all. `before` and `after` empty slots lie at the two ends of everything, so that every
    block of `block` queries has a span of `before + block + after` keys.
    """

    def __init__(
        self, order: SortedOrder, rule: Rule, dropout: PairDropout | None, part: slice, dtype: torch.dtype
    ) -> None:
        """part: the rows of `order` that are laid out; dtype: the dtype of scores."""
        self.rule, self.dropout, self.dtype = rule, dropout, dtype
        self.positions, self.slots = order.positions[part].long(), order.slots[part].long()
        self.real_lengths = order.real_lengths[part].long()
        self.rows, self.rounds, self.length = self.positions.shape
        self.device = self.positions.device
        self.row = torch.arange(part.start, part.stop, device=self.device)
        if rule.attend == "window":
            self.block = 32 if rule.reach > 48 else 16
            self.ring, self.before = 0, round_up(rule.reach, self.block)
            self.after = 0 if rule.causal else self.before
        else:
            self.block = self.ring = self.before = rule.reach
            self.after = 0
        self.padded_length = round_up(self.length, self.block)
        self.row_slots = self.ring + self.padded_length
        self.n_slots = self.rows * self.row_slots
        self.n_blocks = self.n_slots // self.block
        self.span = self.before + self.block + self.after
        self.low, self.high = _slots_in_reach(order.buckets[part], self.real_lengths, rule)
        # Slots and positions are compared as floats: exact up to 2^22 with the halves that occur.
        self.number_dtype = torch.float32 if self.length < 1 << 22 else torch.float64

    def groups(self, n_scores: int) -> Iterator[slice]:
        """Slices of the blocks, each with about n_scores scores."""
        step = max(1, n_scores // (self.block * self.span))
        for start in range(0, self.n_blocks, step):
            yield slice(start, min(start + step, self.n_blocks))

    def own_value_weight(self, dtype: torch.dtype) -> Tensor:
        """(rows, length, 1): weight of its own value for a position that attends to nothing; 0 if it is not real."""
        weight = torch.zeros(self.rows, self.length, dtype=dtype, device=self.device)
        if self.rule.own != "alone":
            return weight[..., None]
        numbers = torch.arange(self.length, device=self.device)
        weight.scatter_(1, self.positions[:, 0], (numbers < self.real_lengths[:, None]).to(dtype))
        if self.dropout is not None:
            weight *= self.dropout.scale(self.row[:, None], numbers, numbers)
        return weight[..., None]

    def last_chunk(self) -> Tensor:
        """(rows,): the slot at which the last chunk with a real position begins."""
        return (self.real_lengths - 1).clamp_min(0) // self.ring * self.ring


@dataclass(frozen=True)
class Interval:
    """For every query an interval of numbers, and a number for every key: the key is inside the interval or outside.

    Attributes:
        number: (n_blocks, span) or (span,) floats.
        middle: (n_blocks, block, 1) floats, of [low, high).
        half: (n_blocks, block, 1) floats, (high − low − 1) / 2.
    """

    number: Tensor
    middle: Tensor
    half: Tensor

    @classmethod
    def of(cls, layout: Layout, number: Tensor, low: Tensor, high: Tensor) -> Interval:
        """The interval [low, high) of every query; low, high: (rows, row_slots) integers."""
        low, high = (x.reshape(layout.n_blocks, layout.block, 1).to(number.dtype) for x in (low, high))
        return cls(number, (low + high - 1) / 2, (high - low - 1) / 2)

    def distance_outside(self, group: slice) -> Tensor:
        """How far each key is outside each query's interval, at least 1/2; 0 if inside. (group, block, span)."""
        return self._distance(group).sub_(self.half[group]).clamp_min_(0.0)

    def distance_inside(self, group: slice) -> Tensor:
        """How far each key is inside each query's interval, at least 1/2; 0 if outside. (group, block, span)."""
        return self._distance(group).neg_().add_(self.half[group] + 0.5).clamp_min_(0.0)

    def _distance(self, group: slice) -> Tensor:
        """How far each key's number is from the middle of each query's interval."""
        number = self.number if self.number.dim() == 1 else self.number[group, None]
        return (number - self.middle[group]).abs_()


class SortedRound:
    """One round of some rows: sorted copies, which pairs count, and the way back to positions."""

    def __init__(self, layout: Layout, number: int) -> None:
        self.layout, self.number = layout, number
        ring, tail = layout.ring, layout.padded_length - layout.length
        positions = F.pad(layout.positions[:, number], (ring, tail))
        low = F.pad(layout.low[:, number] + ring, (ring, tail))
        high = F.pad(layout.high[:, number] + ring, (ring, tail))
        if ring:
            positions[:, :ring], count = self._ring_chunk()
            # The first chunk also reaches the real positions of the ring's chunk, which lie just before it.
            first = slice(ring, min(2 * ring, ring + layout.length))
            low[:, first] = torch.where(low[:, first] < high[:, first], ring - count[:, None], high[:, first])
        slots = torch.arange(layout.row_slots, device=layout.device)
        span_start = slots // layout.block * layout.block - layout.before
        places = torch.arange(layout.span, dtype=layout.number_dtype, device=layout.device)
        self.in_reach = Interval.of(layout, places, low - span_start, high - span_start)
        self.positions = positions
        rows = torch.arange(layout.rows, device=layout.device)[:, None]
        self.sorting = (positions + rows * layout.length).flatten()
        self.unsorting = (layout.slots[:, number] + ring + rows * layout.row_slots).flatten()
        self.span_positions = self._spans(positions) if layout.rule.attend == "chunk" else None
        self.counted_before = list(self._counted_before()) if layout.rule.once else []

    # Sorted copies

    def queries(self, x: Tensor, *, hide: bool = False) -> Tensor:
        """x (rows, length, d) by slot: (n_blocks, block, d). hide: zeros in the slots of the ring and the padding."""
        layout = self.layout
        y = x.reshape(-1, x.shape[-1]).index_select(0, self.sorting)
        if hide:
            rows = y.view(layout.rows, layout.row_slots, -1)
            rows[:, : layout.ring] = 0
            rows[:, layout.ring + layout.length :] = 0
        return y.view(layout.n_blocks, layout.block, -1)

    def keys(self, x: Tensor) -> Tensor:
        """x (rows, length, d) by slot, as overlapping spans: a view of shape (n_blocks, span, d)."""
        layout = self.layout
        y = x.new_empty(layout.before + layout.n_slots + layout.after, x.shape[-1])
        y[: layout.before] = 0
        y[layout.before + layout.n_slots :] = 0
        inside = y[layout.before : layout.before + layout.n_slots]
        torch.index_select(x.reshape(-1, x.shape[-1]), 0, self.sorting, out=inside)
        width = y.shape[1]
        return y.as_strided((layout.n_blocks, layout.span, width), (layout.block * width, width, 1))

    def key_sums(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Zeros for the sums of what spans add to their keys, by slot: (before + n_slots + after, d)."""
        layout = self.layout
        slots = layout.before + layout.n_slots + layout.after
        return torch.zeros(slots, x.shape[-1], dtype=dtype, device=x.device)

    def add_spans(self, sums: Tensor, spans: Tensor, group: slice) -> None:
        """Add spans (group, span, d) to the slots of their keys in `sums`."""
        block = self.layout.block
        for i in range(0, self.layout.span, block):
            place = sums[group.start * block + i : group.stop * block + i]
            place.view(-1, block, sums.shape[1]).add_(spans[:, i : i + block])

    def unsort(self, x: Tensor) -> Tensor:
        """x by slot -> by position: (rows · length, ...)."""
        return x.index_select(0, self.unsorting)

    def add_key_sums(self, sums: Tensor, total: Tensor) -> None:
        """Add the sums of keys, by slot (before + n_slots + after, d), to total (rows · length, d), by position."""
        layout = self.layout
        sums = sums[layout.before : layout.before + layout.n_slots]
        total += self.unsort(sums)
        if layout.ring:
            # A position is in the ring's chunk at most once; slots without a real position hold zeros.
            ring = sums.view(layout.rows, layout.row_slots, -1)[:, : layout.ring].flatten(0, 1)
            index = self.sorting.view(layout.rows, layout.row_slots)[:, : layout.ring].flatten()
            total.index_add_(0, index, ring)

    # Which pairs count

    def scores(self, queries: Tensor, keys: Tensor, group: slice) -> Tensor:
        """q · k of a group, EXCLUDED or less for pairs that do not count: (group, block, span)."""
        exclusion = self.exclusion(group).to(self.layout.dtype)
        if queries.dtype == exclusion.dtype:
            return torch.baddbmm(exclusion, queries[group], keys[group].mT, beta=EXCLUDED)
        return torch.bmm(queries[group], keys[group].mT).to(exclusion.dtype).add_(exclusion, alpha=EXCLUDED)

    def exclusion(self, group: slice) -> Tensor:
        """0 for a pair that counts, at least 1/2 for any other: (group, block, span)."""
        rule = self.layout.rule
        exclusion = self.in_reach.distance_outside(group)
        if self.span_positions is not None:
            spans = self.span_positions
            ahead = spans[group, None] - spans[group, self.layout.before :, None]
            if rule.causal:
                exclusion += ahead.add_(float(rule.excludes_own)).clamp_min_(0.0)
            elif rule.excludes_own:
                exclusion += ahead.abs_().neg_().add_(1.0).clamp_min_(0.0)
        elif rule.excludes_own and not rule.causal:
            exclusion.diagonal(self.layout.before, 1, 2).fill_(1.0)
        for interval in self.counted_before:
            exclusion += interval.distance_inside(group)
        return exclusion

    def dropped(self, weights: Tensor, group: slice) -> Tensor:
        """Weights (group, block, span) after attention dropout."""
        layout = self.layout
        if layout.dropout is None:
            return weights
        blocks = torch.arange(group.start, group.stop, device=layout.device)
        row = layout.row[blocks * layout.block // layout.row_slots][:, None, None]
        positions = self._spans(self.positions)[group]
        keys = positions[:, None]
        queries = positions[:, layout.before : layout.before + layout.block, None]
        return weights * layout.dropout.scale(row, queries, keys).to(weights.dtype)

    def _ring_chunk(self) -> tuple[Tensor, Tensor]:
        """The positions (rows, ring) of the last chunk of the round before, at the end of the ring's slots; and how
        many are real (rows,)."""
        layout = self.layout
        count = layout.real_lengths - layout.last_chunk()
        slots = torch.arange(layout.ring, device=layout.device) + (layout.real_lengths - layout.ring)[:, None]
        before = layout.positions[:, self.number - 1]
        return before.gather(1, slots.clamp(0, layout.length - 1)), count

    def _spans(self, numbers: Tensor) -> Tensor:
        """numbers (rows, row_slots) by slot as (n_blocks, span) floats; −1 beyond the ends."""
        layout = self.layout
        y = F.pad(numbers.flatten().to(layout.number_dtype), (layout.before, layout.after), value=-1.0)
        return y.as_strided((layout.n_blocks, layout.span), (layout.block, 1))

    def _counted_before(self) -> Iterator[Interval]:
        """For the rule `once`: intervals of slots in which a pair has counted already; it must not count again."""
        layout = self.layout
        chunked = layout.rule.attend == "chunk"
        for other in range(self.number):
            yield self._reach_in_round(other)
            if chunked:
                yield self._reach_in_ring(other)
        if chunked:
            # In this round itself: keys of the ring's chunk that the query's own chunks hold too.
            yield self._reach_in_round(self.number, ring_only=True)

    def _reach_in_round(self, other: int, *, ring_only: bool = False) -> Interval:
        """What this round's queries attended to in round `other`: slots of that round, the ring aside."""
        layout = self.layout
        slots = layout.slots[:, other]
        low, high = (x[:, other].gather(1, slots) for x in (layout.low, layout.high))
        return self._interval(slots, low, high, ring_only=ring_only)

    def _reach_in_ring(self, other: int) -> Interval:
        """What the queries that were in the first chunk of round `other` attended to in the ring's chunk: slots of the
        round before it."""
        layout = self.layout
        slots = layout.slots[:, other]
        in_first = (slots < layout.ring) & (slots < layout.real_lengths[:, None])
        low = torch.where(in_first, layout.last_chunk()[:, None], 0)
        return self._interval(layout.slots[:, other - 1], low, in_first * layout.real_lengths[:, None])

    def _interval(self, numbers: Tensor, low: Tensor, high: Tensor, *, ring_only: bool = False) -> Interval:
        """An Interval from tables (rows, length) by position: a number for each key, [low, high) for each query.

        ring_only: only keys in the ring's slots may be inside.
        """
        numbers = numbers.gather(1, self.positions)
        if ring_only:
            numbers[:, self.layout.ring :] = -2
        low, high = low.gather(1, self.positions), high.gather(1, self.positions)
        return Interval.of(self.layout, self._spans(numbers), low, high)


def _slots_in_reach(buckets: Tensor, real_lengths: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    """The slots [low, high) that each slot attends to in its own round, the ring aside.

    Empty for slots without a real position. buckets: (rows, rounds, length) by slot; the results have this shape.
    """
    length = buckets.shape[-1]
    slot = torch.arange(length, device=buckets.device).expand_as(buckets)
    if rule.attend == "window":
        change = buckets[..., 1:] != buckets[..., :-1]
        start = F.pad(change, (1, 0), value=True).mul(slot).cummax(-1).values
        low = torch.maximum(slot - rule.reach, start)
        high = slot if rule.excludes_own else slot + 1
        if not rule.causal:
            end = torch.where(F.pad(change, (0, 1), value=True), slot + 1, length)
            end = end.flip(-1).cummin(-1).values.flip(-1)
            high = torch.minimum(slot + rule.reach + 1, end)
    else:
        chunk = slot // rule.reach
        low, high = (chunk - 1).clamp_min(0) * rule.reach, (chunk + 1) * rule.reach
    is_real = slot < real_lengths[:, None, None]
    high = torch.minimum(high, real_lengths[:, None, None])
    return torch.where(is_real, low, 0), torch.where(is_real, high, 0)
