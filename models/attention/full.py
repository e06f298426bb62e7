"""Full attention, for comparison and for short sequences: time grows with the square of the length."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megabase.models.attention.heads import SeparateAttention, merge_heads
from megabase.models.attention.kernels.inputs import PairDropout
from megabase.models.call import Call
from megabase.models.chance import Seeds


def full_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    mask: Tensor | None = None,
    dropout: PairDropout | None = None,
) -> Tensor:
    """softmax(q · k / √d) v over all positions (causal: over none that is later).

    Without dropout it runs in torch's fused attention; with dropout the weights of all pairs are in memory.

    Args:
        q: queries (batch, heads, length, d).
        k: keys, of the same shape.
        v: values, of the same shape.
        causal: whether a query attends to no later position.
        mask: (batch, length) bool, True where a position is real. Nothing attends to the others, and their output is
            zero.
        dropout: dropout of attention weights; it has batch × heads rows.

    Returns:
        (batch, heads, length, d).
    """
    if dropout is None and mask is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    length = q.shape[2]
    seen = torch.ones(length, length, dtype=torch.bool, device=q.device)
    seen = seen.tril() if causal else seen
    if mask is not None:
        # A position that is not real sees itself, so that its row is not empty; its output is zeroed below.
        seen = (seen & mask[:, None, None]) | torch.eye(length, dtype=torch.bool, device=q.device)
    if dropout is None:
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    else:
        y = dropped_attention(q, k, v, seen, dropout)
    return y if mask is None else y.masked_fill(~mask[:, None, :, None], 0.0)


def dropped_attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, dropout: PairDropout) -> Tensor:
    """softmax(q · k / √d) v with dropout of the weights; the weights of all pairs are in memory.

    Args:
        q: (batch, heads, length, d).
        k, v: (batch, heads, source length, d).
        seen: bool that broadcasts to (batch, heads, length, source length), True where a query attends to a key;
            every query attends to at least one.
        dropout: dropout of attention weights; it has batch × heads rows.

    Returns:
        (batch, heads, length, d) in v's dtype.
    """
    batch, heads, length, d = q.shape
    scores = (q * d**-0.5 @ k.mT).float().masked_fill(~seen, -torch.inf)
    query = torch.arange(length, device=q.device)[:, None]
    key = torch.arange(k.shape[2], device=q.device)
    row = torch.arange(batch * heads, device=q.device)[:, None, None]
    scale = dropout.scale(row, query, key).view(scores.shape)
    return (scores.softmax(-1) * scale).to(v.dtype) @ v


@dataclass
class FullCache:
    """All entries: this cache grows with the tokens read.

    Attributes:
        keys, values: (batch, heads, position, d).
    """

    keys: Tensor
    values: Tensor


class FullAttention(SeparateAttention):
    """The layer: projections, attention to all positions, output projection."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        dropout = self.pair_dropout(call, v.shape[0], v.device)
        return full_attention(q, k, v, causal=self.config.causal, mask=call.mask, dropout=dropout)

    def new_cache(self, batch: int, seeds: Seeds) -> FullCache:
        self.check_causal()
        return FullCache(self.no_keys(batch), self.no_keys(batch))

    def read(self, x: Tensor, near: Tensor, cache: FullCache, position: int, call: Call) -> Tensor:
        q, k, v = self.project(x, near, position)
        cache.keys = torch.cat((cache.keys, k.to(cache.keys.dtype)), dim=2)
        cache.values = torch.cat((cache.values, v.to(cache.values.dtype)), dim=2)
        if q.shape[2] > 1:
            y = self.attend(q, k, v, call)
        else:
            y = F.scaled_dot_product_attention(q.to(cache.keys.dtype), cache.keys, cache.values)
        return self.output(merge_heads(y))
