"""Cross-attention: a decoder's positions read an encoder's. The third branch of a decoder's block."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megabase.models.attention.full import dropped_attention
from megabase.models.attention.heads import merge_heads, output, split_heads, weight_dropout
from megabase.models.attention.kernels.inputs import PairDropout
from megabase.models.call import Call
from megabase.models.chance import Purpose, dropout
from megabase.models.config import ReformerConfig
from megabase.models.layers import Linear, Norm


def cross_attention(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, dropout: PairDropout | None = None
) -> Tensor:
    """softmax(q · k / √d) v over a whole source: (batch, heads, length, d).

    q: (batch, heads, length, d); k, v: (batch, heads, source length, d); mask: (batch, source length) bool, True
    where the source is real. Where nothing of it is, the result is zero. Without dropout of weights it runs in
    torch's fused attention; with it, the weights exist whole.
    """
    seen = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=q.device)
    if mask is not None:
        # A row that sees nothing would be NaN: it sees all, and is zeroed below.
        something = mask.any(-1)[:, None, None, None]
        seen = mask[:, None, None] | ~something
    if dropout is None:
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=None if mask is None else seen)
    else:
        y = dropped_attention(q, k, v, seen, dropout)
    return y if mask is None else y.masked_fill(~something, 0.0)


class CrossAttentionBranch(nn.Module):
    """Norm, attention to the call's context, dropout; (batch, length, dim) -> the same.

    width: of the context, which is normalised already. Positions are compared by content alone.
    """

    def __init__(self, config: ReformerConfig, layer: int, width: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.norm = Norm(config.dim, config.norm, config.norm_eps)
        self.query = Linear(config.dim, config.heads * config.width)
        self.key = Linear(width, config.heads * config.width)
        self.value = Linear(width, config.heads * config.width)
        self.output = output(config)

    def project_context(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (batch, heads, source length, d) of a context (batch, source length, width)."""
        context, heads = context.to(self.key.weight.dtype), self.config.heads
        return split_heads(self.key(context), heads), split_heads(self.value(context), heads)

    def forward(self, x: Tensor, call: Call) -> Tensor:
        assert call.context is not None, "a decoder runs with a context"
        return self.read(x, *self.project_context(call.context), call)

    def read(self, x: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        """The branch, once the context's keys and values are made."""
        config, batch = self.config, x.shape[0]
        q = split_heads(self.query(self.norm(x)), config.heads)
        weights = weight_dropout(
            config.attention_dropout, Purpose.CROSS_WEIGHTS, config.heads, self.layer, call, batch, x.device
        )
        y = self.output(merge_heads(cross_attention(q, k, v, mask=call.context_mask, dropout=weights)))
        if not (call.training and config.dropout):
            return y
        return dropout(y, config.dropout, call.seeds.keys(Purpose.CROSS, self.layer, batch, x.device))
