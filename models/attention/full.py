"""Full attention, for comparison and for short sequences: time grows with the square of the length."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

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
from megabase.models.attention.kernels.inputs import PairDropout
from megabase.models.call import Call
from megabase.models.chance import Seeds

MASKED = 1 << 24
"""Elements of a mask that exist at once where a block attends to tokens before it."""


def full_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    own: bool = True,
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
        own: False: a position does not attend to itself, and one that attends to nothing outputs zero.
        mask: (batch, length) bool, True where a position is real. Nothing attends to the others, and their output is
            zero.
        dropout: dropout of attention weights; it has batch × heads rows.

    Returns:
        (batch, heads, length, d).
    """
    if dropout is None and mask is None and (own or causal):
        if own:
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return attend_to_earlier(partial(F.scaled_dot_product_attention, is_causal=True), q, k, v)
    length = q.shape[2]
    seen = torch.ones(length, length, dtype=torch.bool, device=q.device)
    seen = seen.tril() if causal else seen
    seen = seen if own else seen & ~torch.eye(length, dtype=torch.bool, device=q.device)
    if mask is not None:
        seen = seen & mask[:, None, None] & mask[:, None, :, None]
    # Softmax over no key would be NaN. So a position that attends to nothing sees all, and its output is zeroed below.
    empty = ~seen.any(-1, keepdim=True)
    if dropout is None:
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen | empty)
    else:
        y = dropped_attention(q, k, v, seen | empty, dropout)
    return y.masked_fill(empty, 0.0)


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
        waiting: the last entry, until its value is complete.
    """

    keys: Tensor
    values: Tensor
    waiting: Waiting

    def fork(self, sequences: Tensor) -> FullCache:
        """A copy for some of the sequences; see AttentionLayer."""
        keys, values = self.keys.index_select(0, sequences), self.values.index_select(0, sequences)
        return FullCache(keys, values, self.waiting.fork(sequences))


class FullAttention(SeparateAttention):
    """The layer: projections, attention to all positions, output projection."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        dropout = self.pair_dropout(call, v.shape[0], v.device)
        own = self.ahead is None
        return full_attention(q, k, v, causal=self.config.causal, own=own, mask=call.mask, dropout=dropout)

    def new_cache(self, batch: int, seeds: Seeds) -> FullCache:
        self.check_causal()
        empty = self.no_keys(batch)
        return FullCache(empty, empty, Waiting(empty, empty))

    def read(self, x: Tensor, near: Tensor, cache: FullCache, position: int, call: Call) -> Tensor:
        (q, k), v = self.project(near, position), split_heads(self.value(x), self.config.heads)
        keys, values = cache.waiting.complete(k, v, self.ahead)
        cache.keys = torch.cat((cache.keys, keys.to(cache.keys.dtype)), dim=2)
        cache.values = torch.cat((cache.values, values.to(cache.values.dtype)), dim=2)
        # Where the values look ahead, the first position of all attends to nothing.
        alone = position == 0 and self.ahead is not None
        y = _attend_to_last(q[:, :, alone:].to(cache.keys.dtype), cache.keys, cache.values)
        return self.output(merge_heads(F.pad(y, (0, 0, int(alone), 0))))


def _attend_to_last(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Causal attention of n queries, the last of which attends to all keys, the one before to all but one, ...

    Args:
        q: (batch, heads, n, d).
        keys, values: (batch, heads, length, d), length ≥ n.

    Returns:
        (batch, heads, n, d).
    """
    n, length = q.shape[2], keys.shape[2]
    if n == 0:
        return q
    if n == length:
        return F.scaled_dot_product_attention(q, keys, values, is_causal=True)
    # A piece of the queries at a time, so that masks stay small.
    step = max(1, MASKED // length)
    out = torch.empty_like(q)
    for start in range(0, n, step):
        piece = q[:, :, start : start + step]
        end = length - n + start + piece.shape[2]
        seen = None
        if n > 1:
            seen = torch.ones(piece.shape[2], end, dtype=torch.bool, device=q.device).tril(
                end - piece.shape[2]
            )
        attended = F.scaled_dot_product_attention(piece, keys[:, :, :end], values[:, :, :end], attn_mask=seen)
        out[:, :, start : start + step] = attended
    return out
