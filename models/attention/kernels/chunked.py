"""Sorted attention, streamed through torch's own operations: for devices without a faster kernel, and for fp64.

In slot order the keys of a query are an interval of slots, whatever the rule. Sorted copies of q, k, v are cut into
blocks of queries, and each block attends to one span of keys that starts a fixed number of slots before it. Spans
overlap, so they are strided views rather than copies. Groups of blocks go through batched products (`sorted_copies`).

Rounds are combined by their log-sum-exp one after the other, and the backward pass starts from the log-sum-exp over all
of them, so it too holds one round at a time. No weights are kept: besides the sorted order and a log-sum-exp for each
of its slots, memory is O(length · d) whatever the number of rounds. Un-sorting is a gather with the inverse
permutation, never a scatter: sums have one order, and the same input gives the same bits.

What decides the speed on a CPU: torch's softmax is fused, and several times faster than exp. So both passes use it
within a round, and multiply by the round's share of the softmax over all rounds. Masks are sums of clipped distances
(`SortedRound.exclusion`), because comparisons and masked fills of floats cost more than the products themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from megabase.models.attention.kernels.inputs import PairDropout, Rule, SortedOrder
from megabase.models.attention.kernels.sorted_copies import Layout, SortedRound

EMPTY = -1e28
"""A log-sum-exp below this sums excluded scores only: the position attends to nothing."""

GROUP = 1 << 18
"""Scores that exist at once, in elements: they and their keys should stay in a core's caches."""

SORTED = 1 << 18
"""The most elements of one sorted copy, but at least one row. Rows (batch × heads) beyond that are computed later."""


def sorted_attention(
    q: Tensor, k: Tensor, v: Tensor, order: SortedOrder, rule: Rule, dropout: PairDropout | None = None
) -> Tensor:
    """The same as `reference.sorted_attention`. Products in the inputs' dtype, softmax and sums in fp32 (fp64 for
    fp64)."""
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
                layout = Layout(order, rule, dropout, part, wide)
                _forward(layout, q[part], k[part], v[part], out[part], lse[part])
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.order, ctx.rule, ctx.dropout = order, rule, dropout
        return out.to(v.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        sums = [torch.zeros(x.shape, dtype=out.dtype, device=x.device) for x in (q, k, v)]
        with torch.autocast(q.device.type, enabled=False):
            for part in _row_groups(q):
                layout = Layout(ctx.order, ctx.rule, ctx.dropout, part, out.dtype)
                grad = grads[0][part].to(out.dtype)
                part_sums = [x[part] for x in sums]
                _backward(layout, q[part], k[part], v[part], out[part], lse[part], grad, part_sums)
        return *(x.to(q.dtype) for x in sums), None, None, None


def _row_groups(q: Tensor) -> Iterator[slice]:
    """Slices of the rows: those of one slice are computed together."""
    rows, length, d = q.shape
    step = max(1, SORTED // (length * d))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _forward(layout: Layout, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> None:
    """Fill out (rows, length, d) and lse (rows, rounds, length), the log-sum-exp of every round."""
    flat_out = out.view(-1, out.shape[-1])
    total = torch.empty(layout.rows * layout.length, dtype=lse.dtype, device=lse.device)
    for number in range(layout.rounds):
        round_out, round_lse = _forward_round(SortedRound(layout, number), q, k, v, lse.dtype)
        round_out = round_out.to(out.dtype)
        lse[:, number] = round_lse.view(layout.rows, layout.length)
        if number == 0:
            flat_out.copy_(round_out)
            total.copy_(round_lse)
            continue
        both = torch.logaddexp(total, round_lse)
        flat_out.mul_((total - both).exp_()[:, None]).addcmul_(round_out, (round_lse - both).exp_()[:, None])
        total = both
    empty = (total < EMPTY).view(layout.rows, layout.length, 1)
    own_value = v.to(out.dtype) * layout.own_value_weight(out.dtype)
    torch.where(empty, own_value, out, out=out)


def _forward_round(
    this: SortedRound, q: Tensor, k: Tensor, v: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """One round's own softmax: its output (rows · length, d_v) and log-sum-exp (rows · length), by position."""
    layout = this.layout
    queries, keys, values = this.queries(q), this.keys(k), this.keys(v)
    out = queries.new_empty(layout.n_blocks, layout.block, v.shape[-1])
    lse = queries.new_empty(layout.n_blocks, layout.block, dtype=dtype)
    for group in layout.groups(GROUP):
        scores = this.scores(queries, keys, group)
        weights = scores.softmax(dim=-1)
        # log Σ exp(s) = s − log softmax(s) for any s; for the largest it loses nothing.
        torch.sub(scores.amax(-1), weights.amax(-1).log_(), out=lse[group])
        weights = this.dropped(weights, group).to(v.dtype)
        torch.bmm(weights, values[group], out=out[group])
    return this.unsort(out.flatten(0, 1)), this.unsort(lse.flatten())


def _backward(
    layout: Layout,
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
    empty = (total < EMPTY)[..., None]
    # Softmax over all rounds: dS = P · (dP − Σ dO · O), P = a round's own softmax × its share of the whole.
    delta = (grad * out).sum(-1)
    flat = [x.view(-1, x.shape[-1]) for x in sums]
    for number in range(layout.rounds):
        this = SortedRound(layout, number)
        share = (lse[:, number] - total).exp_().masked_fill_(empty[..., 0], 0.0)
        grads = this.queries((grad * share[..., None]).to(v.dtype), hide=True)
        deltas = this.queries((delta * share)[..., None], hide=True)
        queries, keys, values = this.queries(q), this.keys(k), this.keys(v)
        grad_q = queries.new_empty(queries.shape)
        grad_k, grad_v = this.key_sums(k, out.dtype), this.key_sums(v, out.dtype)
        for group in layout.groups(GROUP):
            weights = this.scores(queries, keys, group).softmax(dim=-1)
            kept = this.dropped(weights, group).to(v.dtype)
            this.add_spans(grad_v, torch.bmm(kept.mT, grads[group]), group)
            grad_scores = this.dropped(torch.bmm(grads[group], values[group].mT).to(out.dtype), group)
            grad_scores = grad_scores.sub_(deltas[group]).mul_(weights).to(q.dtype)
            torch.bmm(grad_scores, keys[group], out=grad_q[group])
            this.add_spans(grad_k, torch.bmm(grad_scores.mT, queries[group]), group)
        flat[0] += this.unsort(grad_q.flatten(0, 1))
        this.add_key_sums(grad_k, flat[1])
        this.add_key_sums(grad_v, flat[2])
    sums[2] += torch.where(empty, grad * layout.own_value_weight(grad.dtype), 0.0)
