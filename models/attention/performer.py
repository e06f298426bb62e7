"""Performer attention, FAVOR+ (Choromanski et al. 2021, arXiv 2009.14794): softmax's kernel as a product of features.

With ω from N(0, I), exp(q · k) = E[exp(ω · q − |q|²/2) exp(ω · k − |k|²/2)] (lemma 1). With one feature for each of
m such directions, attention is φ(q) (Σ φ(k) vᵀ) divided by φ(q) (Σ φ(k)): time grows with length, not its square.

What is special:
- Features exist for a chunk of positions at a time. Causal attention keeps the sums over earlier chunks, and computes
  the weight of every pair within the current chunk. The backward pass computes these sums again from the left, for the
  gradients of queries, and other sums from the right, for those of keys and values. Memory is O(length · d), plus one
  number for each chunk and feature.
- Features are divided by the largest one among the keys that a query attends to (their unit). So no exponential
  overflows at any norm, and the largest never underflows. Units depend on nothing later than the query: causal
  attention is strictly causal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megabase.models.attention.heads import (
    SeparateAttention,
    Waiting,
    attend_to_earlier,
    merge_heads,
    split_heads,
)
from megabase.models.attention.performer_features import (
    Features,
    FeatureSums,
    PairsInChunk,
    draw_directions,
)
from megabase.models.call import Call
from megabase.models.chance import Purpose, Seeds
from megabase.models.config import ConfigError


def performer_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    directions: Tensor,
    *,
    causal: bool,
    own: bool = True,
    mask: Tensor | None = None,
) -> Tensor:
    """An estimate of softmax(q · k / √d) v over all positions (causal: over none that is later).

    Args:
        q: queries (batch, heads, length, d), any float dtype, any length from 1.
        k: keys, of the same shape.
        v: values, of the same shape.
        directions: (heads, features, d), from `draw_directions`; they get no gradient.
        causal: whether a query attends to no later position.
        own: False, only if causal: a position attends to the positions before it, and the first one outputs zero.
        mask: (batch, length) bool, True where a position is real. Nothing attends to the others, and their output is
            zero.

    Returns:
        (batch, heads, length, d) in v's dtype.

    Raises:
        ConfigError: the directions or the mask have another shape.
    """
    batch, heads, length, d = q.shape
    if directions.dim() != 3 or directions.shape[0] != heads or directions.shape[2] != d:
        raise ConfigError(
            f"directions have shape {tuple(directions.shape)}: they must be (heads, features, head_dim) "
            f"= ({heads}, any, {d})"
        )
    if mask is not None and (mask.shape != (batch, length) or mask.dtype != torch.bool):
        raise ConfigError(
            f"mask is {mask.dtype} of shape {tuple(mask.shape)}: it must be bool of shape {(batch, length)}"
        )
    if own:
        y = (_Causal if causal else _Bidirectional).apply(q, k, v, directions, mask)
    else:
        assert causal
        # Keys are one position ahead of their queries' numbers.
        keys_mask = None if mask is None else mask[:, :-1]
        y = attend_to_earlier(lambda q, k, v: _Causal.apply(q, k, v, directions, keys_mask), q, k, v)
    return y if mask is None else y.masked_fill(~mask[:, None, :, None], 0.0)


@dataclass
class PerformerCache:
    """What a causal query needs of the tokens before: sums over them.

    Attributes:
        directions: (heads, features, d).
        sums: over all entries that are complete.
        waiting: the last entry, until its value is complete.
    """

    directions: Tensor
    sums: FeatureSums
    waiting: Waiting

    def fork(self, sequences: Tensor) -> PerformerCache:
        """A copy for some of the sequences; see AttentionLayer."""
        return PerformerCache(self.directions, self.sums.fork(sequences), self.waiting.fork(sequences))


class PerformerAttention(SeparateAttention):
    """The layer: projections, random features, attention, output projection."""

    def directions(self, seeds: Seeds, device: torch.device) -> Tensor:
        """The random directions (heads, features, d) of a step: the same for `redraw_every` steps."""
        config, every = self.config, self.config.performer.redraw_every
        draw = Seeds(seeds.run, seeds.step // every if every else 0)
        seed = draw.number(Purpose.FEATURES, self.layer)
        return draw_directions(config.heads, config.performer.features, config.width, seed, device)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        directions = self.directions(call.seeds, q.device)[call.heads]
        own = self.ahead is None
        return performer_attention(q, k, v, directions, causal=self.config.causal, own=own, mask=call.mask)

    def new_cache(self, batch: int, seeds: Seeds) -> PerformerCache:
        self.check_causal()
        empty = self.no_keys(batch)
        directions = self.directions(seeds, empty.device)
        sums = FeatureSums(Features(empty, empty, directions, None), empty)
        return PerformerCache(directions, sums, Waiting(empty, empty))

    @torch.no_grad()
    def read(self, x: Tensor, near: Tensor, cache: PerformerCache, position: int, call: Call) -> Tensor:
        (q, k), v = self.project(near, position), split_heads(self.value(x), self.config.heads)
        keys, values = cache.waiting.complete(k, v, self.ahead)
        # Where the values look ahead, a query attends to the entries before it: the first token of all to none.
        alone = q.shape[2] - keys.shape[2]
        with torch.autocast(q.device.type, enabled=False):
            features = Features(q[:, :, alone:], keys, cache.directions, None)
            y = _attend_from_left(features, values, cache.sums)[0].to(v.dtype)
        return self.output(merge_heads(F.pad(y, (0, 0, alone, 0))))


class _Causal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, directions: Tensor, mask: Tensor | None) -> Tensor:
        with torch.autocast(q.device.type, enabled=False):
            features = Features(q, k, directions, mask)
            out, log_norm, units = _attend_from_left(features, v, FeatureSums(features, v))
        ctx.save_for_backward(q, k, v, out, log_norm)
        ctx.directions, ctx.mask, ctx.units = directions, mask, units
        return out.to(v.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """With P_ijf = exp(queries_if + keys_jf) / norm_i: the weight of i for j is Σ_f P_ijf, so the gradient of
        queries_if is Σ_j P_ijf (grad_i · v_j − grad_i · out_i), and that of keys_jf the same summed over i."""
        q, k, v, out, log_norm = ctx.saved_tensors
        with torch.autocast(q.device.type, enabled=False):
            features = Features(q, k, ctx.directions, ctx.mask)
            grad = grads[0].to(features.wide)
            delta = (grad * out).sum(-1, keepdim=True)
            grad_q, grad_k, grad_v = (features.empty(x.shape) for x in (q, k, v))

            sums = FeatureSums(features, v)
            for part in features.chunks():
                queries, keys, values = features.of_queries(part), features.of_keys(part), v[:, :, part]
                near = PairsInChunk.of(features, queries, keys, part)
                shares = near.units.mul_((near.level - log_norm[:, :, part]).exp_())
                pairs = features.product(grad[:, :, part], values.mT).sub_(delta[:, :, part]).mul_(shares)
                change = features.product(pairs, near.keys).mul_(near.queries)
                far = queries.add_(sums.unit - log_norm[:, :, part]).exp_()
                change.addcmul_(far, sums.read(grad[:, :, part], delta[:, :, part]))
                grad_q[:, :, part] = features.to_queries(change)
                sums.add_keys(features, keys, values, part)

            # From the right: sums over the queries of later chunks, in the inverse of the keys' units.
            query_sums = FeatureSums(features, v)
            sides = list(zip(features.chunks(), ctx.units, ctx.units[1:], strict=False))
            for part, unit_before, unit in reversed(sides):
                queries, keys, values = features.of_queries(part), features.of_keys(part), v[:, :, part]
                near = PairsInChunk.of(features, queries, keys, part)
                shares = near.units.mul_((near.level - log_norm[:, :, part]).exp_())
                weights = features.product(near.queries, near.keys.mT).mul_(shares)
                pairs = features.product(grad[:, :, part], values.mT).sub_(delta[:, :, part]).mul_(shares)
                change = features.product(pairs.mT, near.queries).mul_(near.keys)
                query_sums.rescale(-unit)
                far = features.in_units(keys, unit, part)
                change.addcmul_(far, query_sums.read(values, 1.0))
                grad_k[:, :, part] = features.to_keys(change, part)
                grad_v[:, :, part] = features.product(weights.mT, grad[:, :, part])
                grad_v[:, :, part] += features.product(far, query_sums.values)
                query_sums.rescale(-unit_before)
                far = queries.add_(unit_before - log_norm[:, :, part]).exp_()
                query_sums.add(far, grad[:, :, part], delta[:, :, part])
        return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype), None, None


def _attend_from_left(
    features: Features, v: Tensor, sums: FeatureSums
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Causal attention, chunk by chunk.

    Args:
        features: the features of queries and keys.
        v: (batch, heads, length, d).
        sums: over all positions before; afterwards they include these.

    Returns:
        The result (batch, heads, length, d), log norm (batch, heads, length, 1), and the sums' units before every chunk
        and at the end.
    """
    out, log_norm = features.empty(v.shape), features.empty((*v.shape[:3], 1))
    units = [sums.unit]
    for part in features.chunks():
        queries, keys, values = features.of_queries(part), features.of_keys(part), v[:, :, part]
        near = PairsInChunk.of(features, queries, keys, part)
        weights = features.product(near.queries, near.keys.mT).mul_(near.units)
        far = queries.add_(sums.unit)
        level_far = far.amax(-1, keepdim=True)
        far = far.sub_(level_far).exp_()
        # Both parts in the larger unit.
        level = torch.maximum(near.level, level_far)
        share, share_far = (near.level - level).exp_(), level_far.sub_(level).exp_()
        norm = share * weights.sum(-1, keepdim=True)
        norm += share_far * (far * sums.ones).sum(-1, keepdim=True)
        # The norm is zero only where a query sees no real position. Divided by infinity, its output is zero.
        norm.masked_fill_(norm == 0, torch.inf)
        total = features.product(weights, values).mul_(share)
        total.addcmul_(features.product(far, sums.values), share_far)
        out[:, :, part] = total.div_(norm)
        log_norm[:, :, part] = norm.log_().add_(level)
        sums.add_keys(features, keys, values, part)
        units.append(sums.unit)
    return out, log_norm, units


class _Bidirectional(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, directions: Tensor, mask: Tensor | None) -> Tensor:
        with torch.autocast(q.device.type, enabled=False):
            features = Features(q, k, directions, mask)
            out, log_norm = features.empty(v.shape), features.empty((*q.shape[:3], 1))
            sums = FeatureSums(features, v)
            for part in features.chunks():
                sums.add_keys(features, features.of_keys(part), v[:, :, part], part)
            for part in features.chunks():
                queries = features.of_queries(part) + sums.unit
                largest = queries.amax(-1, keepdim=True)
                queries = (queries - largest).exp_()
                norm = (queries * sums.ones).sum(-1, keepdim=True)
                norm.masked_fill_(norm == 0, torch.inf)  # as in the causal case
                out[:, :, part] = features.product(queries, sums.values).div_(norm)
                log_norm[:, :, part] = norm.log_().add_(largest)
        ctx.save_for_backward(q, k, v, out, log_norm)
        ctx.directions, ctx.mask, ctx.sums = directions, mask, sums
        return out.to(v.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """As in the causal case, with sums over all positions."""
        q, k, v, out, log_norm = ctx.saved_tensors
        with torch.autocast(q.device.type, enabled=False):
            features = Features(q, k, ctx.directions, ctx.mask)
            grad = grads[0].to(features.wide)
            delta = (grad * out).sum(-1, keepdim=True)
            grad_q, grad_k, grad_v = (features.empty(x.shape) for x in (q, k, v))
            sums, query_sums = ctx.sums, FeatureSums(features, v)
            for part in features.chunks():
                queries = (features.of_queries(part) + (sums.unit - log_norm[:, :, part])).exp_()
                change = sums.read(grad[:, :, part], delta[:, :, part])
                grad_q[:, :, part] = features.to_queries(change.mul_(queries))
                query_sums.add(queries, grad[:, :, part], delta[:, :, part])
            for part in features.chunks():
                keys = features.in_units(features.of_keys(part), sums.unit, part)
                grad_v[:, :, part] = features.product(keys, query_sums.values)
                change = query_sums.read(v[:, :, part], 1.0)
                grad_k[:, :, part] = features.to_keys(change.mul_(keys), part)
        return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype), None, None
