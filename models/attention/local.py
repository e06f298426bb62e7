"""Local attention: queries meet their neighbours. LSH attention's kernel with nothing sorted and one round."""

from __future__ import annotations

import torch
from torch import Tensor

from megabase.models.attention.heads import SeparateAttention, pair_dropout
from megabase.models.attention.kernels import dispatch
from megabase.models.attention.kernels.inputs import PairDropout, Rule, SortedOrder, row_mask
from megabase.models.call import Call


def local_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    causal: bool,
    attend: str = "window",
    mask: Tensor | None = None,
    dropout: PairDropout | None = None,
    backend: str = "auto",
) -> Tensor:
    """softmax(q · k / √d) v over neighbours: q, k, v and result (batch, heads, length, d), any length.

    window: positions, the own one among them: i meets i − window + 1 ... i (not causal: to i + window − 1).
    `attend="chunk"`: i meets its own chunk of `window` positions and the one before, the first chunk the last
    one where not causal, as in trax and transformers. mask: (batch, length) bool, True where a position is
    real; the others are as if they were not there, and their output is zero. backend: as in lsh_attention.
    """
    batch, heads, length, d = q.shape
    rows = batch * heads
    if mask is None:
        order = SortedOrder.identity(rows, length, q.device)
    else:
        nowhere = torch.zeros(rows, 1, length, dtype=torch.int32, device=q.device)
        order = dispatch.sort_by_bucket(nowhere, 1, row_mask(mask, heads))
    reach = window - 1 if attend == "window" else window
    rule = Rule(reach, attend, causal, once=False, shared=False)
    return dispatch.sorted_attention(q, k, v, order, rule, dropout, scale=d**-0.5, backend=backend)


class LocalAttention(SeparateAttention):
    """The layer: projections, attention among neighbours, output projection."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        config = self.config
        return local_attention(
            q,
            k,
            v,
            window=config.local.window,
            causal=config.causal,
            attend=config.local.attend,
            mask=call.mask,
            dropout=pair_dropout(config, self.layer, call, v.shape[0], v.device),
        )
