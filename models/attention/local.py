"""Local attention: queries attend to their neighbours. The kernels of LSH attention compute it, with one round of one
bucket: nothing is hashed, and sorting only moves padding to the end."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from megabase.models.attention.heads import (
    SeparateAttention,
    Waiting,
    attend_to_cached,
    merge_heads,
    split_heads,
)
from megabase.models.attention.kernels import dispatch
from megabase.models.attention.kernels.inputs import PairDropout, Rule, SortedOrder, row_mask
from megabase.models.call import Call
from megabase.models.chance import Seeds
from megabase.models.sequence import Around, Part


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
        q: queries (batch, heads, n, d) of the last n positions: of all, if n = length. Less need a position that is a
            multiple of `window` before them if `attend="chunk"`, and have no gradient.
        k: keys (batch, heads, length, d), any length from 1.
        v: values, of the keys' shape.
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
        (batch, heads, n, d) in v's dtype.

    Raises:
        ConfigError: the backend cannot run with these tensors.
    """
    batch, heads, length, d = k.shape
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

    def before(self, first: int, end: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the positions [first, end), which the cache holds."""
        places = torch.arange(first, end, device=self.keys.device) % self.keys.shape[2]
        return self.keys[:, :, places], self.values[:, :, places]

    def add(self, keys: Tensor, values: Tensor, end: int) -> None:
        """Add the entries (batch, heads, n, d) of the positions [end − n, end)."""
        entries, n = self.keys.shape[2], keys.shape[2]
        new = torch.arange(max(end - n, end - entries), end, device=keys.device)
        self.keys[:, :, new % entries] = keys[:, :, new - (end - n)].to(self.keys.dtype)
        self.values[:, :, new % entries] = values[:, :, new - (end - n)].to(self.values.dtype)

    def fork(self, sequences: Tensor) -> LocalCache:
        """A copy for some of the sequences; see AttentionLayer."""
        keys, values = self.keys.index_select(0, sequences), self.values.index_select(0, sequences)
        return LocalCache(keys, values, self.waiting.fork(sequences))


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

    def attend_part(self, q: Tensor, k: Tensor, v: Tensor, part: Part, call: Call) -> Tensor:
        local = self.config.local
        dropout = call.training and self.config.attention_rate("local")
        if local.attend == "chunk" or dropout:  # both depend on where a position lies in the whole sequence
            return super().attend_part(q, k, v, part, call)
        # The positions around this part are attended to; what they attend to is computed as well, and left out.
        # In whole pieces of the kernels, so that every position is computed as in the whole sequence.
        after = 0 if self.config.causal else local.window
        piece, n = dispatch.piece_of(q.device, local.window + after), q.shape[2]
        around = Around(piece, after, piece)
        mask = None
        if call.mask is not None:
            mask = part.with_neighbours(call.mask, around)
        q, k, v = (part.with_neighbours(each, around, dim=2) for each in (q, k, v))
        first = around.first(part)
        return self.attend(q, k, v, replace(call, mask=mask, part=None))[:, :, first : first + n]

    def new_cache(self, batch: int, seeds: Seeds) -> LocalCache:
        self.check_causal()
        local, empty = self.config.local, self.no_keys(batch)
        entries = local.window * (2 if local.attend == "chunk" else 1)
        keys = empty.new_zeros(*empty.shape[:2], entries, empty.shape[3])
        return LocalCache(keys, torch.zeros_like(keys), Waiting(empty, empty))

    def read(self, x: Tensor, near: Tensor, cache: LocalCache, position: int, call: Call) -> Tensor:
        (q, k), v = self.project(near, position), split_heads(self.value(x), self.config.heads)
        keys, values = cache.waiting.complete(k, v, self.ahead)
        # Entries of the positions [end − n, end) are complete now.
        end = position + q.shape[2] - (self.ahead is not None)
        if q.shape[2] == 1:
            cache.add(keys, values, end)
            return self.output(merge_heads(self._attend_one(q, cache, position, end)))
        first, held = self._first(position), end - keys.shape[2]
        before, values_before = cache.before(first, held)
        cache.add(keys, values, end)
        keys = torch.cat((before, keys.to(before.dtype)), dim=2)
        values = torch.cat((values_before, values.to(before.dtype)), dim=2)
        if self.ahead is not None:
            # Nothing in the block attends to its last position.
            keys, values = F.pad(keys, (0, 0, 0, 1)), F.pad(values, (0, 0, 0, 1))
        return self.output(merge_heads(self.attend(q.to(keys.dtype), keys, values, call)))

    def _first(self, position: int) -> int:
        """The first position that queries from `position` on attend to; a chunk's first one with `attend: chunk`."""
        local = self.config.local
        if local.attend == "chunk":
            return max(0, position // local.window - 1) * local.window
        return max(0, position - local.window + (self.ahead is None))

    def _attend_one(self, q: Tensor, cache: LocalCache, position: int, end: int) -> Tensor:
        """Attention of the query (batch, heads, 1, d) of one position to the cache, which holds entries up to `end`."""
        local, entries = self.config.local, cache.keys.shape[2]
        age = (end - 1 - torch.arange(entries, device=q.device)) % entries
        reach = local.window - 1 if local.attend == "window" else local.window + position % local.window
        q = q.squeeze(2) * q.shape[-1] ** -0.5
        return attend_to_cached(q, cache.keys, cache.values, age <= min(reach, end - 1))[:, :, None]
