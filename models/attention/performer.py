"""Performer attention, FAVOR+ (Choromanski et al. 2021, arXiv 2009.14794): softmax's kernel as a product of features.

With ω from N(0, I), exp(q · k) = E[exp(ω · q − |q|²/2) exp(ω · k − |k|²/2)] (lemma 1). With one feature for each of
m such directions, attention is φ(q) (Σ φ(k) vᵀ) divided by φ(q) (Σ φ(k)): time grows with length, not its square.

What is special:
- Features exist for CHUNK positions at a time. Causal attention carries the sums over earlier chunks along, and
  meets its own chunk pair by pair. The backward pass makes these sums again on a first sweep, for queries, and
  sums from the right on a second one, for keys and values. Memory is O(length · d); besides that one number is
  kept for each chunk and feature.
- Features are in units of the largest that a query sees, so whatever the norms no exponential overflows, and what
  a query sees is never lost. The units cancel exactly: no epsilon biases the ratio. They depend on nothing later
  than the query: causal attention is strictly so.
- Exponents and sums are fp32 (fp64 for fp64). Products are too, but for bf16 inputs, whose are in bf16.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from megabase.models.attention.heads import SeparateAttention
from megabase.models.call import Call
from megabase.models.chance import Purpose, Seeds
from megabase.models.config import ConfigError

CHUNK = 128
"""Positions whose features exist at once."""

FLOOR = -60.0
"""Exponent that no feature of a key falls below, in units of that key's largest, within a chunk: then a query sees a
sum above zero even where all its features are ones that no key has."""

NOTHING = -1e30
"""The exponent of the largest of no features: finite, so that a difference of two is a number."""


def performer_attention(
    q: Tensor, k: Tensor, v: Tensor, directions: Tensor, *, causal: bool, mask: Tensor | None = None
) -> Tensor:
    """An estimate of softmax(q · k / √d) v over everything (causal: over nothing later): (batch, heads, length, d).

    q, k, v: (batch, heads, length, d), any float dtype, any length from 1. directions: (heads, features, d), see
    `draw_directions`; they get no gradient. mask: (batch, length) bool, True where a position is real; the others
    are met by nobody, and their output is zero. Raises ConfigError for directions or a mask of another shape.
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
    kernel = _Causal if causal else _Bidirectional
    return kernel.apply(q, k, v, directions, mask)


class RunningAttention:
    """Causal performer_attention of a sequence that comes in pieces: its sums are all that it keeps.

    like: (batch, heads, 0, d), of the dtype and device that queries, keys and values will have.
    """

    def __init__(self, directions: Tensor, like: Tensor) -> None:
        self.directions = directions
        self.sums = _Sums(_Features(like, like, directions, None), like)

    @torch.no_grad()
    def extend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The result (batch, heads, n, d) for the next n positions. It has no gradient."""
        with torch.autocast(q.device.type, enabled=False):
            return _sweep(_Features(q, k, self.directions, None), v, self.sums)[0].to(v.dtype)


@lru_cache(maxsize=64)
def draw_directions(heads: int, features: int, d: int, seed: int, device: torch.device) -> Tensor:
    """Random directions (heads, features, d) fp32: each from N(0, I), every d of them orthogonal to each other.

    A function of its arguments, drawn on the CPU; the last results are kept, so nobody may write into one.
    Orthogonal directions estimate without bias as well, with less variance (section 2.4).
    """
    # Whatever mode the first caller is in, a later one may need these for its backward pass.
    with torch.inference_mode(False), torch.no_grad():
        generator = torch.Generator().manual_seed(seed)
        shape = (heads, -(-features // d), d, d)
        q, r = torch.linalg.qr(torch.randn(shape, generator=generator))
        # Q is uniform over rotations where R's diagonal is positive; as LAPACK leaves it, it is not.
        q = q * r.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]
        norms = torch.randn(shape, generator=generator).norm(dim=-1, keepdim=True)
        return (q.mT * norms).flatten(1, 2)[:, :features].contiguous().to(device)


class PerformerAttention(SeparateAttention):
    """The layer: projections, random features, attention, output projection."""

    def directions(self, seeds: Seeds, device: torch.device) -> Tensor:
        """The random directions (heads, features, d) of a step: the same for `redraw_every` steps."""
        config, every = self.config, self.config.performer.redraw_every
        draw = Seeds(seeds.run, seeds.step // every if every else 0)
        seed = draw.number(Purpose.FEATURES, self.layer)
        return draw_directions(config.heads, config.performer.features, config.width, seed, device)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        directions = self.directions(call.seeds, q.device)
        return performer_attention(q, k, v, directions, causal=self.config.causal, mask=call.mask)


class _Causal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, directions: Tensor, mask: Tensor | None) -> Tensor:
        with torch.autocast(q.device.type, enabled=False):
            features = _Features(q, k, directions, mask)
            out, log_norm, tops = _sweep(features, v, _Sums(features, v))
            out = features.real(out)
        ctx.save_for_backward(q, k, v, out, log_norm)
        ctx.directions, ctx.mask, ctx.tops = directions, mask, tops
        return out.to(v.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """With P_ijf = exp(queries_if + keys_jf) / norm_i: the weight of i for j is Σ_f P_ijf, so the gradient of
        queries_if is Σ_j P_ijf (grad_i · v_j − grad_i · out_i), and that of keys_jf the same summed over i."""
        q, k, v, out, log_norm = ctx.saved_tensors
        with torch.autocast(q.device.type, enabled=False):
            features = _Features(q, k, ctx.directions, ctx.mask)
            grad = features.real(grads[0].to(features.wide))
            pull = (grad * out).sum(-1, keepdim=True)
            grad_q, grad_k, grad_v = (features.empty(x.shape) for x in (q, k, v))

            sums = _Sums(features, v)
            for part in features.chunks():
                queries, keys, values = features.of_queries(part), features.of_keys(part), v[:, :, part]
                near = _Near.of(features, queries, keys, part)
                shares = near.units.mul_((near.level - log_norm[:, :, part]).exp_())
                pairs = features.product(grad[:, :, part], values.mT).sub_(pull[:, :, part]).mul_(shares)
                change = features.product(pairs, near.keys).mul_(near.queries)
                far = queries.add_(sums.top - log_norm[:, :, part]).exp_()
                change.addcmul_(far, sums.read(grad[:, :, part], pull[:, :, part]))
                grad_q[:, :, part] = features.to_queries(change)
                sums.add_keys(features, keys, values, part)

            # From the right: what the queries of later chunks ask of a key. Units are the keys' inverted.
            asked = _Sums(features, v)
            sides = list(zip(features.chunks(), ctx.tops, ctx.tops[1:], strict=False))
            for part, top_before, top in reversed(sides):
                queries, keys, values = features.of_queries(part), features.of_keys(part), v[:, :, part]
                near = _Near.of(features, queries, keys, part)
                shares = near.units.mul_((near.level - log_norm[:, :, part]).exp_())
                weights = features.product(near.queries, near.keys.mT).mul_(shares)
                pairs = features.product(grad[:, :, part], values.mT).sub_(pull[:, :, part]).mul_(shares)
                change = features.product(pairs.mT, near.queries).mul_(near.keys)
                asked.rescale(-top)
                far = features.in_units(keys, top, part)
                change.addcmul_(far, asked.read(values, 1.0))
                grad_k[:, :, part] = features.to_keys(change, part)
                grad_v[:, :, part] = features.product(weights.mT, grad[:, :, part])
                grad_v[:, :, part] += features.product(far, asked.values)
                asked.rescale(-top_before)
                far = queries.add_(top_before - log_norm[:, :, part]).exp_()
                asked.add(far, grad[:, :, part], pull[:, :, part])
        return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype), None, None


def _sweep(features: _Features, v: Tensor, sums: _Sums) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Causal attention from the left, `sums` being those over what came before; they end as those over everything.

    Returns the result, log norm (batch, heads, length, 1), and the sums' units before every chunk and at the end.
    """
    out, log_norm = features.empty(v.shape), features.empty((*v.shape[:3], 1))
    tops = [sums.top]
    for part in features.chunks():
        queries, keys, values = features.of_queries(part), features.of_keys(part), v[:, :, part]
        near = _Near.of(features, queries, keys, part)
        weights = features.product(near.queries, near.keys.mT).mul_(near.units)
        far = queries.add_(sums.top)
        level_far = far.amax(-1, keepdim=True)
        far = far.sub_(level_far).exp_()
        # The unit of both: the larger.
        level = torch.maximum(near.level, level_far)
        share, share_far = (near.level - level).exp_(), level_far.sub_(level).exp_()
        norm = share * weights.sum(-1, keepdim=True)
        norm += share_far * (far * sums.ones).sum(-1, keepdim=True)
        # Zero only where nothing real is seen: then all that is divided by it becomes zero.
        norm.masked_fill_(norm == 0, torch.inf)
        total = features.product(weights, values).mul_(share)
        total.addcmul_(features.product(far, sums.values), share_far)
        out[:, :, part] = total.div_(norm)
        log_norm[:, :, part] = norm.log_().add_(level)
        sums.add_keys(features, keys, values, part)
        tops.append(sums.top)
    return out, log_norm, tops


class _Bidirectional(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, directions: Tensor, mask: Tensor | None) -> Tensor:
        with torch.autocast(q.device.type, enabled=False):
            features = _Features(q, k, directions, mask)
            out, log_norm = features.empty(v.shape), features.empty((*q.shape[:3], 1))
            sums = _Sums(features, v)
            for part in features.chunks():
                sums.add_keys(features, features.of_keys(part), v[:, :, part], part)
            for part in features.chunks():
                queries = features.of_queries(part) + sums.top
                largest = queries.amax(-1, keepdim=True)
                queries = (queries - largest).exp_()
                norm = (queries * sums.ones).sum(-1, keepdim=True)
                norm.masked_fill_(norm == 0, torch.inf)  # as in the causal case
                out[:, :, part] = features.product(queries, sums.values).div_(norm)
                log_norm[:, :, part] = norm.log_().add_(largest)
            out = features.real(out)
        ctx.save_for_backward(q, k, v, out, log_norm)
        ctx.directions, ctx.mask, ctx.sums = directions, mask, sums
        return out.to(v.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """As in the causal case, with sums over everything."""
        q, k, v, out, log_norm = ctx.saved_tensors
        with torch.autocast(q.device.type, enabled=False):
            features = _Features(q, k, ctx.directions, ctx.mask)
            grad = features.real(grads[0].to(features.wide))
            pull = (grad * out).sum(-1, keepdim=True)
            grad_q, grad_k, grad_v = (features.empty(x.shape) for x in (q, k, v))
            sums, asked = ctx.sums, _Sums(features, v)
            for part in features.chunks():
                queries = (features.of_queries(part) + (sums.top - log_norm[:, :, part])).exp_()
                change = sums.read(grad[:, :, part], pull[:, :, part])
                grad_q[:, :, part] = features.to_queries(change.mul_(queries))
                asked.add(queries, grad[:, :, part], pull[:, :, part])
            for part in features.chunks():
                keys = features.in_units(features.of_keys(part), sums.top, part)
                grad_v[:, :, part] = features.product(keys, asked.values)
                change = asked.read(v[:, :, part], 1.0)
                grad_k[:, :, part] = features.to_keys(change.mul_(keys), part)
        return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype), None, None


class _Features:
    """Exponents of features, a chunk of positions at a time: (batch, heads, chunk, features), and the way back."""

    def __init__(self, q: Tensor, k: Tensor, directions: Tensor, mask: Tensor | None) -> None:
        self.q, self.k, self.mask = q, k, mask
        self.wide = torch.promote_types(q.dtype, torch.float32)
        self.narrow = torch.bfloat16 if q.dtype == torch.bfloat16 else self.wide
        # q · k / √d is the product of two vectors that are scaled by this; the directions are scaled instead.
        self.scale = q.shape[-1] ** -0.25
        self.directions = directions.to(self.wide) * self.scale

    def chunks(self) -> Iterator[slice]:
        """Of positions, from the left."""
        length = self.q.shape[2]
        for start in range(0, length, CHUNK):
            yield slice(start, min(start + CHUNK, length))

    def empty(self, shape: tuple[int, ...]) -> Tensor:
        return self.q.new_empty(shape, dtype=self.wide)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """a @ b, see `_product`."""
        return _product(self.narrow, a, b)

    def of_queries(self, part: slice) -> Tensor:
        """ω · q: without −|q|²/2, which cancels."""
        return self.q[:, :, part].to(self.wide) @ self.directions.mT

    def of_keys(self, part: slice) -> Tensor:
        """ω · k − |k|²/2, NOTHING for a position that is not real."""
        k = self.k[:, :, part].to(self.wide)
        exponents = (k @ self.directions.mT).sub_(k.square().sum(-1, keepdim=True), alpha=0.5 * self.scale**2)
        return exponents if self.mask is None else exponents.masked_fill_(self._hidden(part), NOTHING)

    def in_units(self, exponents: Tensor, top: Tensor, part: slice) -> Tensor:
        """Keys' features in units of exp(top); zero for a position that is not real."""
        features = (exponents - top).exp_()
        return features if self.mask is None else features.masked_fill_(self._hidden(part), 0.0)

    def real(self, x: Tensor) -> Tensor:
        """x (batch, heads, length, d), zero for positions that are not real."""
        return x if self.mask is None else x.masked_fill(self._hidden(slice(None)), 0.0)

    def to_queries(self, grad: Tensor) -> Tensor:
        """Gradient of exponents -> gradient of queries."""
        return grad @ self.directions

    def to_keys(self, grad: Tensor, part: slice) -> Tensor:
        """Gradient of exponents -> gradient of keys."""
        k = self.k[:, :, part].to(self.wide)
        return (grad @ self.directions).sub_(k * grad.sum(-1, keepdim=True), alpha=self.scale**2)

    def _hidden(self, part: slice) -> Tensor:
        assert self.mask is not None
        return ~self.mask[:, None, part, None]


@dataclass(frozen=True)
class _Near:
    """The positions of a chunk among each other: i weighs j by exp(level_i) units_ij Σ_f queries_if keys_jf.

    queries, keys: (batch, heads, chunk, features), each in units of its own largest. units: (batch, heads, chunk,
    chunk), a key's largest in those of the largest that the query sees; zero where it does not see the key. None is
    above 1. level: (batch, heads, chunk, 1). No row depends on what comes after it.
    """

    queries: Tensor
    keys: Tensor
    units: Tensor
    level: Tensor

    @classmethod
    def of(cls, features: _Features, queries: Tensor, keys: Tensor, part: slice) -> _Near:
        """From exponents of queries and keys."""
        top_queries, top_keys = queries.amax(-1, keepdim=True), keys.amax(-1, keepdim=True)
        seen = top_keys.cummax(-2).values
        return cls(
            (queries - top_queries).exp_(),
            features.in_units(torch.maximum(keys, top_keys + FLOOR), top_keys, part),
            (top_keys.mT - seen).clamp_max_(0.0).exp_().tril_(),
            top_queries.add_(seen),
        )


class _Sums:
    """Sums over positions of feature · value, and of feature · 1, for every feature in units of exp(top).

    top, ones: (batch, heads, 1, features); values: (batch, heads, features, d).
    """

    def __init__(self, features: _Features, v: Tensor) -> None:
        self.narrow = features.narrow
        shape = (*v.shape[:2], 1, features.directions.shape[1])
        self.top = torch.full(shape, NOTHING, dtype=features.wide, device=v.device)
        self.ones = torch.zeros_like(self.top)
        self.values = features.empty((*v.shape[:2], shape[-1], v.shape[-1])).zero_()

    def rescale(self, top: Tensor) -> None:
        """To units of exp(top), which is not below the present one."""
        shrink = (self.top - top).exp_()
        self.ones *= shrink
        self.values *= shrink.mT
        self.top = top

    def add_keys(self, features: _Features, exponents: Tensor, values: Tensor, part: slice) -> None:
        """Add the keys and values of a chunk, in units of the largest so far."""
        self.rescale(torch.maximum(self.top, exponents.amax(-2, keepdim=True)))
        self.add(features.in_units(exponents, self.top, part), values, 1.0)

    def add(self, features: Tensor, values: Tensor, one: Tensor | float) -> None:
        """Add positions: their features (..., chunk, features), values (..., chunk, d), and what counts as 1."""
        self.ones += (features * one).sum(-2, keepdim=True)
        self.values += _product(self.narrow, features.mT, values)

    def read(self, values: Tensor, one: Tensor | float) -> Tensor:
        """(..., chunk, features): values (..., chunk, d) · those of each feature, − one · its ones."""
        return _product(self.narrow, values, self.values.mT).sub_(self.ones * one)


def _product(narrow: torch.dtype, a: Tensor, b: Tensor) -> Tensor:
    """a @ b computed in `narrow`, and returned in fp32, or fp64 where that is fp64."""
    return (a.to(narrow) @ b.to(narrow)).to(torch.promote_types(narrow, torch.float32))
