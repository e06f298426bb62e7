"""What every kind of attention shares: the interface of a layer, the branch around it, projections, dropout.

Shapes: x is (batch, length, dim), normalised. `near` is x after the short convolution (or x itself without one):
queries and keys are made from it, values from x. Heads are split as (batch, heads, length, d).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megabase.models.attention.by_heads import attend_by_heads, head_groups
from megabase.models.attention.kernels.inputs import PairDropout
from megabase.models.call import Call
from megabase.models.chance import Purpose, Seeds, dropout
from megabase.models.config import ConfigError, ReformerConfig
from megabase.models.device import devices_in_use
from megabase.models.layers import Linear, ShortConvolution, ValuesAhead, look_ahead
from megabase.models.norm import Norm
from megabase.models.positions import rotary
from megabase.models.precision import Precision
from megabase.models.sequence import Part
from megabase.models.streams import moved


class AttentionLayer(nn.Module, ABC):
    """One kind of attention, with the cache that reading in blocks needs.

    Attention of all positions has three steps: projections of `near` and x, `mix`, and the output projection. Heads
    do not depend on each other, so a very long sequence is computed some heads at a time (by_heads.py).

    A cache holds what later tokens need of the tokens that were read. `new_cache` returns an empty one; `read` reads
    a block of tokens with it. Every cache has these properties:

    - Reading a sequence in blocks, of any sizes, returns what `forward` returns for the whole sequence, up to rounding.
    - It holds tensors and numbers only: no module, and nothing of a `Call`. `fork(sequences)` returns a cache for some
      of the sequences, given by their numbers (n,) int64, which shares no memory that either of the two writes to.
    - Its size has a bound that does not depend on how many tokens were read, unless its class says so.
    """

    OF_NEAR: ClassVar[tuple[str, ...]]
    """The names of the projections of `near`. x has one, `value`."""

    value: Linear
    output: Linear

    def __init__(self, config: ReformerConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        ahead = config.looks_ahead(config.pattern[layer])
        self.ahead = ValuesAhead(config.heads) if ahead else None

    def forward(self, x: Tensor, near: Tensor, call: Call) -> Tensor:
        """Attention of all positions: (batch, length, dim)."""
        groups = head_groups(self, near, call)
        if len(groups) > 1:
            return attend_by_heads(self, x, near, call, groups)
        projected = [*(getattr(self, name)(near) for name in self.OF_NEAR), self.value(x)]
        shares = None if self.ahead is None else self.ahead.weight
        return self.output(self.mix(projected, shares, replace(call, heads=groups[0].of_process)))

    @property
    def in_groups(self) -> bool:
        """Whether groups of heads can be computed on their own: the projections are linear maps and nothing else."""
        maps = [getattr(self, name) for name in (*self.OF_NEAR, "value", "output")]
        return all(type(each) is Linear and each.bias is None for each in maps)

    @abstractmethod
    def mix(self, projected: Sequence[Tensor], shares: Tensor | None, call: Call) -> Tensor:
        """Attention of some heads, or of all, between the projections.

        Args:
            projected: what the projections `OF_NEAR` and `value` return for these heads: (batch, length, heads · d)
                each.
            shares: (2 · heads,), of ValuesAhead; None: the values do not look ahead.
            call: `call.heads` are the heads that this process attends with: all that were projected or, if the
                sequence has parts, its share of them.

        Returns:
            (batch, length, heads · d).
        """

    def new_cache(self, batch: int, seeds: Seeds) -> Any:
        """The cache of `batch` sequences before their first token. A kind of attention without a cache inherits this.

        Args:
            batch: number of sequences.
            seeds: the seeds of every pass that will use the cache.

        Raises:
            ConfigError: this kind of attention, or these settings, cannot read a sequence in blocks.
        """
        kind = self.config.pattern[self.layer]
        raise ConfigError(
            f"model.layers has {kind!r}, which cannot generate token by token: take local, lsh, full or performer"
        )

    def read(self, x: Tensor, near: Tensor, cache: Any, position: int, call: Call) -> Tensor:
        """Attention of a block of tokens to itself and to the tokens before; then the cache holds the block too.

        Args:
            x, near: (batch, n, dim), of the block.
            cache: a cache that this layer's `new_cache` returned.
            position: the position of the block's first token: how many tokens were read before.
            call: with the seeds that the cache was made with.

        Returns:
            (batch, n, dim).
        """
        raise NotImplementedError

    def check_causal(self) -> None:
        """Raise ConfigError unless the layer is causal: only then can it read in blocks."""
        if not self.config.causal:
            raise ConfigError(
                "model.causal=False: a model that sees both sides cannot generate; train one with causal=True"
            )

    def split(self, x: Tensor) -> Tensor:
        """(batch, length, heads · d) -> (batch, heads, length, d), of any number of heads."""
        return split_heads(x, x.shape[-1] // self.config.width)

    def values(self, v: Tensor, shares: Tensor | None, call: Call) -> Tensor:
        """The values (batch, heads, length, d) of projected ones, each mixed with the next if the values look ahead."""
        return self.split(v if shares is None else look_ahead(v, shares, call.mask, call.part))

    def no_keys(self, batch: int) -> Tensor:
        """An empty tensor (batch, heads, 0, d), in the dtype and on the device of this layer's keys."""
        weight = self.output.weight
        dtype = Precision.current(weight.device).compute_dtype(weight.dtype)
        return weight.new_empty(batch, self.config.heads, 0, self.config.width, dtype=dtype)

    def pair_dropout(self, call: Call, batch: int, device: torch.device) -> PairDropout | None:
        """Dropout of this layer's attention weights for rows = batch × heads, or None where it is off."""
        rate = self.config.attention_rate(self.config.pattern[self.layer])
        purpose = Purpose.ATTENTION_WEIGHTS
        return weight_dropout(rate, purpose, self.config.heads, self.layer, call, batch, device)


@dataclass
class Waiting:
    """The entry of the last token that was read, if the values look ahead: it waits for the next token's value.

    Attributes:
        keys, values: (batch, heads, n, d), n = 1; 0 before the first token, and always if the values do not look ahead.
            The values are not mixed.
    """

    keys: Tensor
    values: Tensor

    def complete(self, keys: Tensor, values: Tensor, ahead: ValuesAhead | None) -> tuple[Tensor, Tensor]:
        """The entries that are complete once a block was read. Then this object holds the block's last entry.

        Args:
            keys, values: (batch, heads, n, d) of the block; the values are not mixed.
            ahead: mixes the values; None: they do not look ahead.

        Returns:
            Keys and mixed values of the waiting position, if there is one, and of the block without its last position.
            If `ahead` is None: those of the block.
        """
        if ahead is None:
            return keys, values
        keys = torch.cat((self.keys, keys.to(self.keys.dtype)), dim=2)
        values = torch.cat((self.values, values.to(self.values.dtype)), dim=2)
        self.keys, self.values = keys[:, :, -1:].clone(), values[:, :, -1:].clone()
        return keys[:, :, :-1], ahead.pairs(values)

    def fork(self, sequences: Tensor) -> Waiting:
        """A copy for some of the sequences; see AttentionLayer."""
        return Waiting(self.keys.index_select(0, sequences), self.values.index_select(0, sequences))


class SeparateAttention(AttentionLayer):
    """A layer with separate queries, keys and values: projections, `attend`, output projection."""

    OF_NEAR = ("query", "key")

    def __init__(self, config: ReformerConfig, layer: int) -> None:
        super().__init__(config, layer)
        gain = config.gain(config.pattern[layer]) ** 0.5
        # Keys start as queries do, so that equal content matches from the first step on, as with shared query-keys.
        with torch.random.fork_rng(devices_in_use()):
            self.query = projection(config, gain)
        self.key = projection(config, gain)
        self.value = projection(config)
        self.output = output(config)

    @abstractmethod
    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        """Attention of all positions: (batch, heads, length, d) each -> the same. The heads are `call.heads`."""

    def attend_part(self, q: Tensor, k: Tensor, v: Tensor, part: Part, call: Call) -> Tensor:
        """`attend` where q, k and v are a part of the sequence."""
        q, k, v = (part.to_heads(each) for each in (q, k, v))
        return part.to_positions(self.attend(q, k, v, call.of_all_positions()))

    def mix(self, projected: Sequence[Tensor], shares: Tensor | None, call: Call) -> Tensor:
        q, k, v = projected
        q, k = self.positioned(self.split(q), self.split(k), call.start)
        v = self.values(v, shares, call)
        if call.part is None:
            return merge_heads(self.attend(q, k, v, call))
        return merge_heads(self.attend_part(q, k, v, call.part, call))

    def project(self, near: Tensor, start: int = 0) -> tuple[Tensor, Tensor]:
        """Queries and keys (batch, heads, length, d) of the positions from `start` on."""
        return self.positioned(self.split(self.query(near)), self.split(self.key(near)), start)

    def positioned(self, q: Tensor, k: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Queries and keys with their positions, from `start` on."""
        if self.config.positions == "rotary":
            return rotary(q, start), rotary(k, start)
        return q, k


@dataclass
class BranchCache:
    """What an attention branch keeps of the tokens that were read.

    Attributes:
        inputs: (batch, conv − 1, dim), the last inputs of the short convolution; zeros before the first token.
        layer: the cache of the attention layer.
    """

    inputs: Tensor
    layer: Any

    def fork(self, sequences: Tensor) -> BranchCache:
        """A copy for some of the sequences; see AttentionLayer."""
        return BranchCache(self.inputs.index_select(0, sequences), self.layer.fork(sequences))


class AttentionBranch(nn.Module):
    """F of a block: norm, short convolution, attention, dropout; (batch, length, dim) -> the same."""

    def __init__(self, config: ReformerConfig, layer: int, attention: AttentionLayer) -> None:
        super().__init__()
        self.layer = layer
        self.rate = config.dropout
        self.norm = Norm(config.dim, config.norm, config.norm_eps)
        self.convolution = (
            ShortConvolution(config.dim, config.conv, causal=config.causal) if config.conv else None
        )
        self.attention = attention

    def forward(self, x: Tensor, call: Call) -> Tensor:
        x = self.norm(x, source=call.source)
        near = x if self.convolution is None else self.convolution(x, call.mask, call.part)
        if not (call.training and self.rate):
            return self.attention(x, near, call)
        keys = call.seeds.keys(Purpose.ATTENTION, self.layer, x.shape[0], x.device)
        if call.grad is not None and len(head_groups(self.attention, near, call)) > 1:
            grad = moved(call.grad, x.device, Precision.current(x.device).compute_dtype(x.dtype))
            call = replace(call, grad=dropout(grad, self.rate, keys, call.start))
        return dropout(self.attention(x, near, call), self.rate, keys, call.start)

    def new_cache(self, batch: int, call: Call) -> BranchCache:
        """The cache of `batch` sequences before their first token; see AttentionLayer."""
        before = 0 if self.convolution is None else self.convolution.before
        weight = self.norm.weight
        inputs = weight.new_zeros(batch, before, weight.shape[0])
        return BranchCache(inputs, self.attention.new_cache(batch, call.seeds))

    def read(self, x: Tensor, cache: BranchCache, position: int, call: Call) -> Tensor:
        """The branch's output (batch, n, dim) for a block of tokens, without dropout; see AttentionLayer."""
        x = near = self.norm(x)
        if self.convolution is not None:
            before = cache.inputs.shape[1]
            inputs = torch.cat((cache.inputs, x), dim=1)
            near = self.convolution(inputs, None)[:, before:]
            cache.inputs = inputs[:, inputs.shape[1] - before :].clone()
        return self.attention.read(x, near, cache.layer, position, call)


def projection(config: ReformerConfig, gain: float = 1.0) -> Linear:
    """A linear map from dim to heads · width; its outputs have variance gain² at the start."""
    return Linear(config.dim, config.heads * config.width, gain=gain)


def output(config: ReformerConfig) -> Linear:
    """A linear map from heads · width to dim, so small that `depth` such branches add up to variance 1."""
    return Linear(config.heads * config.width, config.dim, gain=config.depth**-0.5)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(batch, length, heads · d) -> (batch, heads, length, d)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def attend_to_earlier(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor], q: Tensor, k: Tensor, v: Tensor
) -> Tensor:
    """Attention of every position to the positions before it, without itself; zeros for the first one.

    Args:
        attend: causal attention, in which a position attends to itself too: queries, keys, values -> output.
        q, k, v: (batch, heads, length, d).

    Returns:
        (batch, heads, length, d).
    """
    return F.pad(attend(q[:, :, 1:], k[:, :, :-1], v[:, :, :-1]), (0, 0, 1, 0))


def merge_heads(x: Tensor) -> Tensor:
    """(batch, heads, length, d) -> (batch, length, heads · d)."""
    return x.transpose(1, 2).flatten(2)


def weight_dropout(
    rate: float, purpose: Purpose, heads: int, layer: int, call: Call, batch: int, device: torch.device
) -> PairDropout | None:
    """Dropout of attention weights for rows = batch × heads, or None where it is off."""
    if not (call.training and rate):
        return None
    keys = call.seeds.keys(purpose, layer, batch, device)
    # Multiples of an odd 64-bit number make the keys of the heads differ in both halves, which random_bits hashes.
    head_salts = torch.arange(heads, device=device)[call.heads] * 0x632BE59BD9B4E019
    return PairDropout(rate, (keys[:, None] ^ head_salts).flatten())


def attend_to_cached(q: Tensor, keys: Tensor, values: Tensor, seen: Tensor) -> Tensor:
    """softmax(keys · q) values over the cached entries that a query sees; q is scaled already.

    Args:
        q: (..., d), one query.
        keys, values: (..., entries, d).
        seen: (..., entries) bool.

    Returns:
        (..., d) in the dtype of `values`; zeros for a query that sees no entry.
    """
    scores = (keys @ q.to(keys.dtype)[..., None]).squeeze(-1)
    empty = ~seen.any(dim=-1, keepdim=True)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    weights = scores.masked_fill(~(seen | empty), -torch.inf).softmax(-1).masked_fill(empty, 0.0)
    return (weights.to(values.dtype)[..., None, :] @ values).squeeze(-2)
