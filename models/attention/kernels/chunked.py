"""Sorted attention, streamed through torch's own operations: for wherever no faster kernel runs, and for fp64.

In seat order every rule is "the seats of an interval". Sorted copies of q, k, v are cut into blocks of queries,
and each block meets one span of keys that starts a fixed number of seats before it; spans overlap, so they are
strided views, not copies. Groups of blocks go through batched products.

Rounds are combined by their log-sum-exp as they come, and the backward pass starts from the log-sum-exp over all
of them, so it too holds one round at a time. No weights are kept: besides the seats and a log-sum-exp for each,
memory is O(length · d) whatever the number of rounds. Un-sorting is a gather with the inverse permutation, never
a scatter: sums have one order, and the same input gives the same bits.

What decides the speed on a CPU: softmax is fused and several times faster than exp, so both passes use it and
carry a row's share of the whole in a factor; and masks are sums of clipped distances (`_Round.gap`), because
comparisons and masked fills of floats cost more than the products themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megabase.models.attention.kernels.inputs import PairDropout, Rule, SortedOrder
from megabase.models.config import round_up

HIDDEN = -1e30
"""Score of a pair that does not meet: finite, so that a row of them makes no NaN."""

LONELY = -1e28
"""A log-sum-exp below this is one of hidden scores only."""

GROUP = 1 << 18
"""Scores that exist at once, in elements: they and their keys should stay in a core's caches."""

SORTED = 1 << 18
"""Elements of one sorted copy that exist at once; the rows (batch × heads) beyond them wait."""


def sorted_attention(
    q: Tensor, k: Tensor, v: Tensor, order: SortedOrder, rule: Rule, dropout: PairDropout | None = None
) -> Tensor:
    """See models.attention.kernels. Products in the inputs' dtype, softmax and sums in fp32 (fp64 for fp64)."""
    return _SortedAttention.apply(q.contiguous(), k.contiguous(), v.contiguous(), order, rule, dropout)


class _SortedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, order: SortedOrder, rule: Rule, dropout: PairDropout | None
    ) -> Tensor:
        wide = torch.promote_types(q.dtype, torch.float32)
        out = torch.empty(v.shape, dtype=wide, device=v.device)
        lse = torch.empty(order.positions.shape, dtype=wide, device=q.device)
        with torch.autocast(q.device.type, enabled=False):
            for part in _row_groups(q):
                hall = _Hall(order, rule, dropout, part, wide)
                _forward(hall, q[part], k[part], v[part], out[part], lse[part])
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.order, ctx.rule, ctx.dropout = order, rule, dropout
        return out.to(v.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        sums = [torch.zeros(x.shape, dtype=out.dtype, device=x.device) for x in (q, k, v)]
        with torch.autocast(q.device.type, enabled=False):
            for part in _row_groups(q):
                hall = _Hall(ctx.order, ctx.rule, ctx.dropout, part, out.dtype)
                grad = grads[0][part].to(out.dtype)
                _backward(
                    hall, q[part], k[part], v[part], out[part], lse[part], grad, [x[part] for x in sums]
                )
        return *(x.to(q.dtype) for x in sums), None, None, None


def _row_groups(q: Tensor) -> Iterator[slice]:
    rows, length, d = q.shape
    step = max(1, SORTED // (length * d))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _forward(hall: _Hall, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> None:
    """Fill out (rows, length, d) and lse (rows, rounds, length), the log-sum-exp of every round."""
    flat_out = out.view(-1, out.shape[-1])
    total = torch.empty(hall.rows * hall.length, dtype=lse.dtype, device=lse.device)
    for number in range(hall.rounds):
        this = _Round(hall, number)
        qs, ks, vs = this.queries(q), this.keys(k), this.keys(v)
        sorted_out = qs.new_empty(hall.blocks, hall.block, v.shape[-1])
        sorted_lse = total.new_empty(hall.blocks, hall.block)
        for group in hall.groups():
            scores = this.scores(qs, ks, group)
            weights = scores.softmax(dim=-1)
            # log Σ exp(s) = s − log softmax(s) for any s; for the largest it loses nothing.
            torch.sub(scores.amax(-1), weights.amax(-1).log_(), out=sorted_lse[group])
            weights = this.dropped(weights, group).to(v.dtype)
            torch.bmm(weights, vs[group], out=sorted_out[group])
        round_out = this.unsort(sorted_out.flatten(0, 1)).to(out.dtype)
        round_lse = this.unsort(sorted_lse.flatten())
        lse[:, number] = round_lse.view(hall.rows, hall.length)
        if number == 0:
            flat_out.copy_(round_out)
            total.copy_(round_lse)
            continue
        both = torch.logaddexp(total, round_lse)
        flat_out.mul_((total - both).exp_()[:, None]).addcmul_(round_out, (round_lse - both).exp_()[:, None])
        total = both
    lonely = (total < LONELY).view(hall.rows, hall.length, 1)
    alone = v.to(out.dtype) * hall.alone(out.dtype)
    torch.where(lonely, alone, out, out=out)


def _backward(
    hall: _Hall,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    grad: Tensor,
    sums: list[Tensor],
) -> None:
    """Add the gradients of q, k, v to `sums`, given that of out."""
    total = lse.logsumexp(dim=1)
    lonely = (total < LONELY)[..., None]
    # Softmax over all rounds: dS = P · (dP − Σ dO · O), P = a round's own softmax × its share of the whole.
    pull = (grad * out).sum(-1)
    flat = [x.view(-1, x.shape[-1]) for x in sums]
    for number in range(hall.rounds):
        this = _Round(hall, number)
        share = (lse[:, number] - total).exp_().masked_fill_(lonely[..., 0], 0.0)
        qs, ks, vs = this.queries(q), this.keys(k), this.keys(v)
        grads = this.queries((grad * share[..., None]).to(v.dtype), hide=True)
        pulls = this.queries((pull * share)[..., None], hide=True)
        grad_q = qs.new_empty(qs.shape)
        grad_k, grad_v = this.keys_like(k, out.dtype), this.keys_like(v, out.dtype)
        for group in hall.groups():
            weights = this.scores(qs, ks, group).softmax(dim=-1)
            kept = this.dropped(weights, group).to(v.dtype)
            this.add_spans(grad_v, torch.bmm(kept.mT, grads[group]), group)
            grad_scores = this.dropped(torch.bmm(grads[group], vs[group].mT).to(out.dtype), group)
            grad_scores = grad_scores.sub_(pulls[group]).mul_(weights).to(q.dtype)
            torch.bmm(grad_scores, ks[group], out=grad_q[group])
            this.add_spans(grad_k, torch.bmm(grad_scores.mT, qs[group]), group)
        flat[0] += this.unsort(grad_q.flatten(0, 1))
        this.gather_keys(grad_k, flat[1])
        this.gather_keys(grad_v, flat[2])
    sums[2] += torch.where(lonely, grad * hall.alone(grad.dtype), 0.0)


class _Hall:
    """The geometry of some rows, the same in every round.

    Rows lie end to end. Each has `lead` seats for the ring's chunk (rule `chunk` only), then its own, padded to
    whole blocks. `before` and `after` empty seats lie at the two ends of it all, so that every block of `block`
    queries has a span of `before + block + after` keys.
    """

    def __init__(
        self, order: SortedOrder, rule: Rule, dropout: PairDropout | None, part: slice, dtype: torch.dtype
    ) -> None:
        self.rule, self.dropout, self.dtype = rule, dropout, dtype
        self.order, self.rank = order.positions[part].long(), order.slots[part].long()
        self.real = order.real_lengths[part].long()
        self.rows, self.rounds, self.length = self.order.shape
        self.device = self.order.device
        self.row = torch.arange(part.start, part.stop, device=self.device)
        if rule.attend == "window":
            self.block = 32 if rule.reach > 48 else 16
            self.lead, self.before = 0, round_up(rule.reach, self.block)
            self.after = 0 if rule.causal else self.before
        else:
            self.block = self.lead = self.before = rule.reach
            self.after = 0
        self.inside = round_up(self.length, self.block)
        self.stride = self.lead + self.inside
        self.seats = self.rows * self.stride
        self.blocks = self.seats // self.block
        self.span = self.before + self.block + self.after
        self.low, self.high = _intervals(order.buckets[part], self.real, rule)
        # Seats and positions are compared as floats: exact up to 2^22 with the halves that occur.
        self.exact = torch.float32 if self.length < 1 << 22 else torch.float64

    def groups(self) -> Iterator[slice]:
        """Blocks, so many at a time that their scores are about GROUP."""
        step = max(1, GROUP // (self.block * self.span))
        for start in range(0, self.blocks, step):
            yield slice(start, min(start + step, self.blocks))

    def alone(self, dtype: torch.dtype) -> Tensor:
        """(rows, length, 1): weight of its own value for a position that meets nothing; 0 if it is not real."""
        real = torch.zeros(self.rows, self.length, dtype=dtype, device=self.device)
        seats = torch.arange(self.length, device=self.device)
        real.scatter_(1, self.order[:, 0], (seats < self.real[:, None]).to(dtype))
        if self.dropout is not None:
            real *= self.dropout.scale(self.row[:, None], seats, seats)
        return real[..., None]


@dataclass(frozen=True)
class _Interval:
    """For every query an interval of numbers, and the number of every key, as floats that are compared.

    middle, half: (blocks, block, 1), half = (high − low − 1) / 2 for [low, high). number: (blocks, span) or (span,).
    """

    number: Tensor
    middle: Tensor
    half: Tensor

    @classmethod
    def of(cls, hall: _Hall, number: Tensor, low: Tensor, high: Tensor) -> _Interval:
        """low, high: integers by seat; number: ready."""
        low, high = (x.reshape(hall.blocks, hall.block, 1).to(number.dtype) for x in (low, high))
        return cls(number, (low + high - 1) / 2, (high - low - 1) / 2)

    def outside(self, group: slice) -> Tensor:
        """How far each key is outside each query's interval; 0 inside. (group, block, span)."""
        number = self.number if self.number.dim() == 1 else self.number[group, None]
        return (number - self.middle[group]).abs_().sub_(self.half[group]).clamp_min_(0.0)

    def inside(self, group: slice) -> Tensor:
        """At least 1/2 where a key is inside, else 0."""
        number = self.number if self.number.dim() == 1 else self.number[group, None]
        return (number - self.middle[group]).abs_().neg_().add_(self.half[group] + 0.5).clamp_min_(0.0)


class _Round:
    """One round of some rows: sorted copies, who is hidden from whom, and the way back."""

    def __init__(self, hall: _Hall, number: int) -> None:
        self.hall, self.number = hall, number
        order, rank = hall.order[:, number], hall.rank[:, number]
        tail = hall.inside - hall.length
        positions = F.pad(order, (hall.lead, tail))
        low = F.pad(hall.low[:, number] + hall.lead, (hall.lead, tail))
        high = F.pad(hall.high[:, number] + hall.lead, (hall.lead, tail))
        if hall.lead:
            positions[:, : hall.lead], ring = self._ring()
            first = slice(hall.lead, min(2 * hall.lead, hall.lead + hall.length))
            low[:, first] = torch.where(
                low[:, first] < high[:, first], hall.lead - ring[:, None], high[:, first]
            )
        start = torch.arange(hall.stride, device=hall.device) // hall.block * hall.block - hall.before
        places = torch.arange(hall.span, dtype=hall.exact, device=hall.device)
        self.met = _Interval.of(hall, places, low - start, high - start)
        self.positions = positions
        offsets = torch.arange(hall.rows, device=hall.device)[:, None]
        self.index = (positions + offsets * hall.length).flatten()
        self.inverse = (rank + hall.lead + offsets * hall.stride).flatten()
        self.place = self._spans(positions) if hall.rule.attend == "chunk" else None
        self.earlier = list(self._earlier()) if hall.rule.once else []

    # Sorted copies

    def queries(self, x: Tensor, *, hide: bool = False) -> Tensor:
        """x (rows, length, d) by seat: (blocks, block, d). hide: zero in the seats that are nobody's."""
        hall = self.hall
        y = x.reshape(-1, x.shape[-1]).index_select(0, self.index)
        if hide:
            seats = y.view(hall.rows, hall.stride, -1)
            seats[:, : hall.lead] = 0
            seats[:, hall.lead + hall.length :] = 0
        return y.view(hall.blocks, hall.block, -1)

    def keys(self, x: Tensor) -> Tensor:
        """x (rows, length, d) by seat, as overlapping spans: a view of shape (blocks, span, d)."""
        hall = self.hall
        y = x.new_empty(hall.before + hall.seats + hall.after, x.shape[-1])
        y[: hall.before] = 0
        y[hall.before + hall.seats :] = 0
        inside = y[hall.before : hall.before + hall.seats]
        torch.index_select(x.reshape(-1, x.shape[-1]), 0, self.index, out=inside)
        return y.as_strided((hall.blocks, hall.span, y.shape[1]), (hall.block * y.shape[1], y.shape[1], 1))

    def keys_like(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Zeros by seat for the sums of what spans give: (before + seats + after, d)."""
        hall = self.hall
        return torch.zeros(hall.before + hall.seats + hall.after, x.shape[-1], dtype=dtype, device=x.device)

    def add_spans(self, total: Tensor, spans: Tensor, group: slice) -> None:
        """Add spans (group, span, d) to where their keys lie in `total`."""
        block = self.hall.block
        for i in range(0, self.hall.span, block):
            place = total[group.start * block + i : group.stop * block + i]
            place.view(-1, block, total.shape[1]).add_(spans[:, i : i + block])

    def unsort(self, x: Tensor) -> Tensor:
        """x by seat -> by position: (rows · length, ...)."""
        return x.index_select(0, self.inverse)

    def gather_keys(self, x: Tensor, total: Tensor) -> None:
        """Add what keys got, by seat (before + seats + after, d), to total (rows · length, d), by position."""
        hall = self.hall
        x = x[hall.before : hall.before + hall.seats]
        total += self.unsort(x)
        if hall.lead:
            # Each position sits in the ring's chunk at most once; seats that are nobody's hold zeros.
            ring = x.view(hall.rows, hall.stride, -1)[:, : hall.lead].flatten(0, 1)
            total.index_add_(0, self.index.view(hall.rows, hall.stride)[:, : hall.lead].flatten(), ring)

    # Who meets whom

    def scores(self, qs: Tensor, ks: Tensor, group: slice) -> Tensor:
        """q · k of a group, HIDDEN or less where they do not meet: (group, block, span)."""
        gap = self.gap(group).to(self.hall.dtype)
        if qs.dtype == gap.dtype:
            return torch.baddbmm(gap, qs[group], ks[group].mT, beta=HIDDEN)
        return torch.bmm(qs[group], ks[group].mT).to(gap.dtype).add_(gap, alpha=HIDDEN)

    def gap(self, group: slice) -> Tensor:
        """0 where query and key meet, at least 1/2 elsewhere: (group, block, span)."""
        rule = self.hall.rule
        gap = self.met.outside(group)
        if self.place is not None:
            delta = self.place[group, None] - self.place[group, self.hall.before :, None]
            if rule.causal:
                gap += delta.add_(float(rule.shared)).clamp_min_(0.0)
            elif rule.shared:
                gap += delta.abs_().neg_().add_(1.0).clamp_min_(0.0)
        elif rule.shared and not rule.causal:
            gap.diagonal(self.hall.before, 1, 2).fill_(1.0)
        for interval in self.earlier:
            gap += interval.inside(group)
        return gap

    def dropped(self, weights: Tensor, group: slice) -> Tensor:
        """Weights after attention dropout."""
        hall = self.hall
        if hall.dropout is None:
            return weights
        block = torch.arange(group.start, group.stop, device=hall.device)
        row = hall.row[block * hall.block // hall.stride][:, None, None]
        places = self._spans(self.positions)[group]
        keys, queries = places[:, None], places[:, hall.before : hall.before + hall.block, None]
        return weights * hall.dropout.scale(row, queries, keys).to(weights.dtype)

    def _ring(self) -> tuple[Tensor, Tensor]:
        """The last chunk of real positions of the round before, at the end of `lead` seats; and how many they are."""
        hall = self.hall
        last = (hall.real - 1).clamp_min(0) // hall.lead
        count = hall.real - last * hall.lead
        seats = torch.arange(hall.lead, device=hall.device) + (hall.real - hall.lead)[:, None]
        return hall.order[:, self.number - 1].gather(1, seats.clamp(0, hall.length - 1)), count

    def _spans(self, numbers: Tensor) -> Tensor:
        """numbers (rows, stride) by seat as (blocks, span) floats; −1 beyond the ends."""
        hall = self.hall
        y = F.pad(numbers.flatten().to(hall.exact), (hall.before, hall.after), value=-1.0)
        return y.as_strided((hall.blocks, hall.span), (hall.block, 1))

    def _earlier(self) -> Iterator[_Interval]:
        """Intervals of seats in which a pair has met before, so that it does not count again here."""
        hall = self.hall
        chunked = hall.rule.attend == "chunk"
        for other in range(self.number):
            yield self._interval(other, hall.low[:, other], hall.high[:, other])
            if chunked:
                yield self._ring_interval(other)
        if chunked:
            # In this round itself: keys of the ring's chunk that the own chunks hold too.
            low, high = hall.low[:, self.number], hall.high[:, self.number]
            yield self._interval(self.number, low, high, ring_only=True)

    def _interval(self, other: int, low: Tensor, high: Tensor, *, ring_only: bool = False) -> _Interval:
        """[low, high) by seat of round `other`, for the queries of this round; keys by their seat there."""
        rank = self.hall.rank[:, other]
        return self._seen(rank, low.gather(1, rank), high.gather(1, rank), ring_only=ring_only)

    def _ring_interval(self, other: int) -> _Interval:
        """What the queries that sat in the first chunk of round `other` saw of the ring's chunk."""
        hall = self.hall
        first = (hall.rank[:, other] < hall.lead) & (hall.rank[:, other] < hall.real[:, None])
        last = (hall.real - 1).clamp_min(0)[:, None] // hall.lead * hall.lead
        return self._seen(hall.rank[:, other - 1], torch.where(first, last, 0), first * hall.real[:, None])

    def _seen(self, rank: Tensor, low: Tensor, high: Tensor, *, ring_only: bool = False) -> _Interval:
        """An interval from numbers by position; ring_only: of the keys in the `lead` seats only."""
        numbers = rank.gather(1, self.positions)
        if ring_only:
            numbers[:, self.hall.lead :] = -2
        low, high = low.gather(1, self.positions), high.gather(1, self.positions)
        return _Interval.of(self.hall, self._spans(numbers), low, high)


def _intervals(buckets: Tensor, real: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    """The seats [low, high) that each seat may meet in its own round, the ring aside; empty for seats that are
    nobody's. buckets: (rows, rounds, length) by seat; the result has this shape too."""
    length = buckets.shape[-1]
    seat = torch.arange(length, device=buckets.device).expand_as(buckets)
    if rule.attend == "window":
        change = buckets[..., 1:] != buckets[..., :-1]
        start = F.pad(change, (1, 0), value=True).mul(seat).cummax(-1).values
        low = torch.maximum(seat - rule.reach, start)
        high = seat if rule.shared else seat + 1
        if not rule.causal:
            end = torch.where(F.pad(change, (0, 1), value=True), seat + 1, length)
            end = end.flip(-1).cummin(-1).values.flip(-1)
            high = torch.minimum(seat + rule.reach + 1, end)
    else:
        chunk = seat // rule.reach
        low, high = (chunk - 1).clamp_min(0) * rule.reach, (chunk + 1) * rule.reach
    occupied = seat < real[:, None, None]
    high = torch.minimum(high, real[:, None, None])
    return torch.where(occupied, low, 0), torch.where(occupied, high, 0)
