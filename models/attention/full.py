"""Full attention, for comparison and for short sequences: time grows with length squared."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megabase.models.attention.heads import SeparateAttention, pair_dropout
from megabase.models.attention.kernels.inputs import PairDropout
from megabase.models.call import Call


def full_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    mask: Tensor | None = None,
    dropout: PairDropout | None = None,
) -> Tensor:
    """softmax(q · k / √d) v over everything (causal: over nothing later): (batch, heads, length, d).

    mask: (batch, length) bool, True where a position is real; the others are met by nobody, and their output is
    zero. Without dropout of weights it runs in torch's fused attention; with it, the weights exist whole.
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
    """softmax(q · k / √d) v over the pairs that are `seen`, with dropout of the weights, which exist whole.

    q: (batch, heads, length, d); k, v: (batch, heads, source length, d); seen: bool that broadcasts to
    (batch, heads, length, source length), no row of it empty.
    """
    batch, heads, length, d = q.shape
    scores = (q * d**-0.5 @ k.mT).float().masked_fill(~seen, -torch.inf)
    query = torch.arange(length, device=q.device)[:, None]
    key = torch.arange(k.shape[2], device=q.device)
    row = torch.arange(batch * heads, device=q.device)[:, None, None]
    scale = dropout.scale(row, query, key).view(scores.shape)
    return (scores.softmax(-1) * scale).to(v.dtype) @ v


class FullAttention(SeparateAttention):
    """The layer: projections, attention, output projection."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        dropout = pair_dropout(self.config, self.layer, call, v.shape[0], v.device)
        return full_attention(q, k, v, causal=self.config.causal, mask=call.mask, dropout=dropout)
