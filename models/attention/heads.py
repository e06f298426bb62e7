"""What every attention layer shares: the branch around it, and its projections.

A layer is a module with forward(x, near, call): x (batch, length, dim) normalised; near is x, or x after the
short convolution, from which queries and keys are made; values come from x itself.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from megabase.models.attention.kernels.inputs import PairDropout
from megabase.models.call import Call
from megabase.models.chance import Purpose, dropout
from megabase.models.config import ReformerConfig
from megabase.models.layers import Linear, Norm, ShortConvolution
from megabase.models.positions import rotary


class AttentionBranch(nn.Module):
    """F of a block: norm, short convolution, attention, dropout; (batch, length, dim) -> the same."""

    def __init__(self, config: ReformerConfig, layer: int, attention: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.rate = config.dropout
        self.norm = Norm(config.dim, config.norm, config.norm_eps)
        self.convolution = (
            ShortConvolution(config.dim, config.conv, causal=config.causal) if config.conv else None
        )
        self.attention = attention

    def forward(self, x: Tensor, call: Call) -> Tensor:
        x = self.norm(x)
        near = x if self.convolution is None else self.convolution(x, call.mask)
        y = self.attention(x, near, call)
        if not (call.training and self.rate):
            return y
        return dropout(y, self.rate, call.seeds.keys(Purpose.ATTENTION, self.layer, x.shape[0], x.device))


class SeparateAttention(nn.Module, ABC):
    """A layer with separate queries, keys and values: projections, what `attend` does, output projection."""

    def __init__(self, config: ReformerConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.query = projection(config)
        self.key = projection(config)
        self.value = projection(config)
        self.output = output(config)

    def project(self, x: Tensor, near: Tensor, start: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (batch, heads, length, d) of positions from `start` on."""
        q, k, v = self.unturned(x, near)
        if self.config.positions == "rotary":
            q, k = rotary(q, start), rotary(k, start)
        return q, k, v

    def unturned(self, x: Tensor, near: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values without rotary positions."""
        heads = self.config.heads
        return (
            split_heads(self.query(near), heads),
            split_heads(self.key(near), heads),
            split_heads(self.value(x), heads),
        )

    @abstractmethod
    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        """(batch, heads, length, d) each -> the same."""

    def forward(self, x: Tensor, near: Tensor, call: Call) -> Tensor:
        return self.output(merge_heads(self.attend(*self.project(x, near), call)))


def projection(config: ReformerConfig) -> Linear:
    """dim -> heads · width."""
    return Linear(config.dim, config.heads * config.width)


def output(config: ReformerConfig) -> Linear:
    """heads · width -> dim, small enough that `depth` such branches add up to one."""
    return Linear(config.heads * config.width, config.dim, gain=config.depth**-0.5)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(batch, length, heads · d) -> (batch, heads, length, d)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(batch, heads, length, d) -> (batch, length, heads · d)."""
    return x.transpose(1, 2).flatten(2)


def pair_dropout(
    config: ReformerConfig, layer: int, call: Call, batch: int, device: torch.device
) -> PairDropout | None:
    """Dropout of self-attention's weights for rows = batch × heads, or None where it is off."""
    rate = config.attention_rate(config.pattern[layer])
    return weight_dropout(rate, Purpose.ATTENTION_WEIGHTS, config.heads, layer, call, batch, device)


def weight_dropout(
    rate: float, purpose: Purpose, heads: int, layer: int, call: Call, batch: int, device: torch.device
) -> PairDropout | None:
    """Dropout of attention weights for rows = batch × heads, or None where it is off."""
    if not (call.training and rate):
        return None
    keys = call.seeds.keys(purpose, layer, batch, device)
    # Heads apart by an odd multiple in both halves of the key: random_bits hashes the two.
    apart = torch.arange(heads, device=device) * 0x632BE59BD9B4E019
    return PairDropout(rate, (keys[:, None] ^ apart).flatten())
