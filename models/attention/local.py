"""Local attention: queries attend to their neighbours. The kernels of LSH attention compute it, with one round of one
bucket: nothing is hashed, and sorting only moves padding to the end."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megabase.models.attention.heads import (
    SeparateAttention,
    Waiting,
    attend_to_cached,
    merge_heads,
    split_heads,
    with_last,
)
from megabase.models.attention.kernels import dispatch
from megabase.models.attention.kernels.inputs import PairDropout, Rule, SortedOrder, row_mask
from megabase.models.call import Call
from megabase.models.chance import Seeds


def local_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    causal: bool,
    attend: str = "window",
    own: bool = True,
    mask: Tensor | None = None,
    dropout: PairDropout | None = None,
    backend: str = "auto",
) -> Tensor:
    """softmax(q · k / √d) v over neighbours.

    Args:
        q: queries (batch, heads, length, d), any length from 1.
        k: keys, of the same shape.
        v: values, of the same shape.
        window: positions. `attend="window"`: position i attends to i − window + 1 ... i (not causal: up to
            i + window − 1). `attend="chunk"`: to its own chunk of `window` positions and the one before; where not
            causal, the first chunk attends to the last one, as in trax and transformers.
        causal: whether a query attends to no later position.
        attend: `window` or `chunk`.
        own: False: a position does not attend to itself. With `attend="window"` position i then attends to
            i − window ... i − 1 (not causal: up to i + window), and one that attends to nothing outputs zero.
        mask: (batch, length) bool, True where a position is real. Others do not count as neighbours, and their output
            is zero.
        dropout: dropout of attention weights; it has batch × heads rows.
        backend: as in lsh_attention.

    Returns:
        (batch, heads, length, d) in v's dtype.

    Raises:
        ConfigError: the backend cannot run with these tensors.
    """
    batch, heads, length, d = q.shape
    rows = batch * heads
    if mask is None:
        order = SortedOrder.identity(rows, length, q.device)
    else:
        one_bucket = torch.zeros(rows, 1, length, dtype=torch.int32, device=q.device)
        order = dispatch.sort_by_bucket(one_bucket, 1, row_mask(mask, heads))
    reach = window - 1 if attend == "window" and own else window
    rule = Rule(reach, attend, causal, once=False, own="always" if own else "never")
    return dispatch.sorted_attention(q, k, v, order, rule, dropout, scale=d**-0.5, backend=backend)


@dataclass
class LocalCache:
    """The last entries: as many as a window holds, or two chunks.

    Attributes:
        keys, values: (batch, heads, entries, d). The entry of position p is at index p % entries.
        waiting: the last entry, until its value is complete.
    """

    keys: Tensor
    values: Tensor
    waiting: Waiting


class LocalAttention(SeparateAttention):
    """The layer: projections, attention to neighbours, output projection."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        config = self.config
        return local_attention(
            q,
            k,
            v,
            window=config.local.window,
            causal=config.causal,
            attend=config.local.attend,
            own=self.ahead is None,
            mask=call.mask,
            dropout=self.pair_dropout(call, v.shape[0], v.device),
        )

    def new_cache(self, batch: int, seeds: Seeds) -> LocalCache:
        self.check_causal()
        local, empty = self.config.local, self.no_keys(batch)
        entries = local.window * (2 if local.attend == "chunk" else 1)
        keys = empty.new_zeros(*empty.shape[:2], entries, empty.shape[3])
        return LocalCache(keys, torch.zeros_like(keys), Waiting(empty, empty))

    def read(self, x: Tensor, near: Tensor, cache: LocalCache, position: int, call: Call) -> Tensor:
        (q, k), v = self.project(near, position), split_heads(self.value(x), self.config.heads)
        keys, values = cache.waiting.complete(k, v, self.ahead)
        # Entries of the positions [first, end) are complete now.
        end, entries = position + q.shape[2] - (self.ahead is not None), cache.keys.shape[2]
        first = end - keys.shape[2]
        kept = torch.arange(max(first, end - entries), end, device=q.device)
        cache.keys[:, :, kept % entries] = keys[:, :, kept - first].to(cache.keys.dtype)
        cache.values[:, :, kept % entries] = values[:, :, kept - first].to(cache.values.dtype)
        if q.shape[2] > 1:
            return self.output(merge_heads(self.attend(q, k, with_last(values, q), call)))
        newest = end - 1
        age = (newest - torch.arange(entries, device=q.device)) % entries
        local = self.config.local
        reach = local.window - 1 if local.attend == "window" else local.window + position % local.window
        y = attend_to_cached(
            q.squeeze(2) * q.shape[-1] ** -0.5, cache.keys, cache.values, age <= min(reach, newest)
        )
        return self.output(merge_heads(y[:, :, None]))
