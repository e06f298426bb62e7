"""Cross-attention: a decoder's positions attend to an encoder's. The third branch of a decoder's block."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megabase.models.attention.full import dropped_attention
from megabase.models.attention.heads import merge_heads, output, split_heads, weight_dropout
from megabase.models.attention.kernels.inputs import PairDropout
from megabase.models.call import Call
from megabase.models.chance import Purpose, dropout
from megabase.models.config import ReformerConfig
from megabase.models.layers import Linear
from megabase.models.norm import Norm


def cross_attention(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, dropout: PairDropout | None = None
) -> Tensor:
    """softmax(q · k / √d) v over a whole source.

    Without dropout it runs in torch's fused attention; with dropout the weights of all pairs are in memory.

    Args:
        q: (batch, heads, length, d).
        k, v: (batch, heads, source length, d).
        mask: (batch, source length) bool, True where the source is real. A source without a real token gives zeros.
        dropout: dropout of attention weights; it has batch × heads rows.

    Returns:
        (batch, heads, length, d).
    """
    seen = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=q.device)
    if mask is not None:
        # Softmax over no key would be NaN. So queries of a source without real tokens see all of it, and their output
        # is zeroed below.
        not_empty = mask.any(-1)[:, None, None, None]
        seen = mask[:, None, None] | ~not_empty
    if dropout is None:
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=None if mask is None else seen)
    else:
        y = dropped_attention(q, k, v, seen, dropout)
    return y if mask is None else y.masked_fill(~not_empty, 0.0)


@dataclass
class ContextCache:
    """The context's keys and values. They do not change while tokens are read.

    Attributes:
        keys, values: (batch, heads, source length, d).
    """

    keys: Tensor
    values: Tensor

    def fork(self, sequences: Tensor) -> ContextCache:
        """A copy for some of the sequences; see AttentionLayer."""
        return ContextCache(self.keys.index_select(0, sequences), self.values.index_select(0, sequences))


class CrossAttentionBranch(nn.Module):
    """Norm, attention to the call's context, dropout; (batch, length, dim) -> the same.

    Queries and keys have no positions: content alone is compared.

    Args:
        config: the settings of the decoder.
        layer: number of the block.
        width: channels of the context, which is normalised already.
    """

    def __init__(self, config: ReformerConfig, layer: int, width: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.norm = Norm(config.dim, config.norm, config.norm_eps)
        self.query = Linear(config.dim, config.heads * config.width)
        self.key = Linear(width, config.heads * config.width)
        self.value = Linear(width, config.heads * config.width)
        self.output = output(config)

    def forward(self, x: Tensor, call: Call) -> Tensor:
        x = self.norm(x, source=call.source)
        return self._attend(x, self.new_cache(x.shape[0], call), call)

    def new_cache(self, batch: int, call: Call) -> ContextCache:
        """The keys and values of the call's context."""
        assert call.context is not None, "a decoder runs with a context"
        context, heads = call.context.to(self.key.weight.dtype), self.config.heads
        return ContextCache(split_heads(self.key(context), heads), split_heads(self.value(context), heads))

    def read(self, x: Tensor, cache: ContextCache, position: int, call: Call) -> Tensor:
        """The branch's output (batch, n, dim) for any block of positions; each attends to the context alone."""
        return self._attend(self.norm(x), cache, call)

    def _attend(self, x: Tensor, cache: ContextCache, call: Call) -> Tensor:
        """The branch's output for any positions, whose norm is x."""
        config, batch = self.config, x.shape[0]
        q = split_heads(self.query(x), config.heads)
        pair_dropout = weight_dropout(
            config.attention_dropout, Purpose.CROSS_WEIGHTS, config.heads, self.layer, call, batch, x.device
        )
        y = cross_attention(q, cache.keys, cache.values, mask=call.context_mask, dropout=pair_dropout)
        y = self.output(merge_heads(y))
        if not (call.training and config.dropout):
            return y
        return dropout(y, config.dropout, call.seeds.keys(Purpose.CROSS, self.layer, batch, x.device))
