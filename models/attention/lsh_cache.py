"""What an LSH layer keeps of the tokens that were read: the last `reach` entries of every bucket of every round.

What is special:
- Keys and values are kept once for each position, not once for each round. (The last entries of a bucket in one round
  are mostly among those of other buckets in the other rounds.)
- Entries lie in the order of their positions, so a block of tokens is appended to them and then attends by the kernels
  of training: to what a pass over the whole sequence would show it.
- Entries that no later token can find are removed when a quarter of all entries may be such. So a token costs the same
  at any position, and the entries are at most 5/4 of rounds · buckets · reach, plus SPARE.
- A single token looks up its buckets in `Recent`, which is built when the first single token is read.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megabase.models.attention.heads import attend_to_cached
from megabase.models.attention.kernels import dispatch
from megabase.models.attention.kernels.inputs import Rotations, Rule, SortedOrder
from megabase.models.attention.kernels.reference import first_occurrences
from megabase.models.layers import ValuesAhead

SPARE = 512
"""Entries that may be added before the first removal."""


@dataclass
class Recent:
    """Where the last entries of every bucket are.

    Attributes:
        entries: (batch, heads, rounds, buckets, reach) int32, indices of entries, in any order; −1: there is none.
        counts: (batch, heads, rounds, buckets) int64, how many entries a bucket was given; the next one replaces the
            one at counts % reach.
    """

    entries: Tensor
    counts: Tensor

    @classmethod
    def of(cls, order: SortedOrder, batch: int, n_buckets: int, reach: int) -> Recent:
        """From the sorted order of all entries."""
        rows, rounds, length = order.positions.shape
        bucket = order.buckets.long().clamp_max(n_buckets)  # where padding is, n_buckets or more
        slots = torch.arange(length, device=bucket.device)
        real = slots < order.real_lengths[:, None, None]
        counts = torch.zeros(rows, rounds, n_buckets + 1, dtype=torch.int64, device=bucket.device)
        counts.scatter_add_(2, bucket, real.expand_as(bucket).long())
        rank = slots - (counts.cumsum(2) - counts).gather(2, bucket)
        row, number, slot = (_last_of_bucket(order, reach) & real).nonzero(as_tuple=True)
        entries = torch.full((rows, rounds, n_buckets, reach), -1, dtype=torch.int32, device=bucket.device)
        place = (row, number, slot)
        entries[row, number, bucket[place], rank[place] % reach] = order.positions[place]
        heads = rows // batch
        return cls(entries.unflatten(0, (batch, heads)), counts[..., :-1].unflatten(0, (batch, heads)))

    def find(self, buckets: Tensor) -> Tensor:
        """The entries (rows, rounds · reach) int64 of one bucket (rows, rounds) of each row and round; −1 for none."""
        return self.entries.flatten(0, 1)[_indices(buckets)].flatten(1).long()

    def add(self, buckets: Tensor, entry: int) -> None:
        """Add an entry to one bucket (rows, rounds) of each row and round."""
        place = _indices(buckets)
        counts, entries = self.counts.flatten(0, 1), self.entries.flatten(0, 1)
        entries[(*place, counts[place] % entries.shape[-1])] = entry
        counts[place] += 1

    def fork(self, sequences: Tensor) -> Recent:
        """A copy for some of the sequences; see AttentionLayer."""
        return Recent(self.entries.index_select(0, sequences), self.counts.index_select(0, sequences))


@dataclass
class LSHCache:
    """The entries, in the order of their positions.

    Attributes:
        rotations: the rotations that hash query-keys.
        reach: entries of a bucket that a query can find.
        keys, values: (batch, heads, capacity, d), of which the first `used` count. Keys have unit length. If the values
            look ahead, the last one is that of its own position alone, until the next token is read.
        buckets: (batch, heads, rounds, capacity) int32; −1: padding, because the heads of a batch keep different
            numbers of entries. It lies before the entries.
        last_value: (batch, heads, n, d), n = 1: the value of the last position, which is not mixed with the next
            one. n = 0 before the first token, and always if the values do not look ahead.
        most: beyond this number of entries, those that no query can find are removed.
        used: number of entries, with padding.
        padded: whether there is padding.
        recent: None until a single token is read, and again when entries have moved or a block was read.
    """

    rotations: Rotations
    reach: int
    keys: Tensor
    values: Tensor
    buckets: Tensor
    last_value: Tensor
    most: int
    used: int = 0
    padded: bool = False
    recent: Recent | None = None

    @classmethod
    def new(cls, rotations: Rotations, reach: int, no_keys: Tensor) -> LSHCache:
        """An empty cache for keys and values like `no_keys` (batch, heads, 0, d)."""
        batch, heads = no_keys.shape[:2]
        buckets = torch.empty(batch, heads, rotations.rounds, 0, dtype=torch.int32, device=no_keys.device)
        return cls(rotations, reach, no_keys, no_keys, buckets, no_keys, most=SPARE)

    def complete(self, values: Tensor, ahead: ValuesAhead) -> Tensor:
        """Mix the values of a block with their next ones.

        Args:
            values: (batch, heads, n, d), n ≥ 1, not mixed.
            ahead: mixes them.

        Returns:
            Values like them, of which the last one is not mixed. The last value of the cache is now mixed with the
            block's first one.
        """
        values = values.to(self.values.dtype)
        mixed = ahead.pairs(torch.cat((self.last_value, values), dim=2))
        self.last_value = values[:, :, -1:].clone()
        if self.used:
            self.values[:, :, self.used - 1] = mixed[:, :, 0]
            mixed = mixed[:, :, 1:]
        return torch.cat((mixed, self.last_value), dim=2)

    def add(self, keys: Tensor, values: Tensor, buckets: Tensor) -> None:
        """Add the entries of the next n positions.

        Args:
            keys: (batch, heads, n, d), of unit length.
            values: like them, complete but for the last one.
            buckets: (batch, heads, rounds, n) int32.
        """
        end = self.used + keys.shape[2]
        if end > self.keys.shape[2]:
            extra = max(end, self.most) - self.used
            self.keys, self.values = (_extended(x, self.used, extra, 2) for x in (self.keys, self.values))
            self.buckets = _extended(self.buckets, self.used, extra, 3)
        self.keys[:, :, self.used : end] = keys
        self.values[:, :, self.used : end] = values
        self.buckets[..., self.used : end] = buckets
        self.used = end

    def order(self) -> SortedOrder:
        """The sorted order of all entries."""
        buckets = self.buckets[..., : self.used].flatten(0, 1)
        mask = buckets[:, 0] >= 0 if self.padded else None
        return dispatch.sort_by_bucket(buckets, self.rotations.n_buckets, mask)

    def attend(self, qk: Tensor, rule: Rule) -> Tensor:
        """Attention of the newest n positions, whose entries were added; qk (batch, heads, n, d) -> the same."""
        order = self.order()
        keys, values = self.keys[:, :, : self.used], self.values[:, :, : self.used]
        y = dispatch.sorted_attention(qk.to(keys.dtype), keys, values, order, rule)
        self.recent = None
        if self.used > self.most:
            self.remove(order)
        return y

    def attend_one(self, qk: Tensor, buckets: Tensor, own_value: Tensor, *, once: bool) -> Tensor:
        """Attention of the next position to the entries of its buckets. Its own entry is not among them yet.

        Args:
            qk: (batch, heads, 1, d).
            buckets: (batch, heads, rounds, 1), the buckets of the query-key.
            own_value: (batch, heads, 1, d), the output of a position that finds no entry.
            once: whether a key found in several rounds counts once.

        Returns:
            (batch, heads, 1, d).
        """
        if self.used >= self.most:
            self.remove(self.order())
        if self.recent is None:
            self.recent = Recent.of(self.order(), qk.shape[0], self.rotations.n_buckets, self.reach)
        if not self.used:
            return own_value
        found = self.recent.find(buckets.flatten(0, 1).squeeze(-1))
        seen = found >= 0
        empty = ~seen.any(dim=-1, keepdim=True)
        first = torch.arange(found.shape[0], device=found.device)[:, None] * self.keys.shape[2]
        place = (found.clamp_min(0) + first).flatten()
        keys, values = (
            x.flatten(0, 2).index_select(0, place).view(*found.shape, -1) for x in (self.keys, self.values)
        )
        if once:
            seen = first_occurrences(found, seen)
        y = attend_to_cached(qk.flatten(0, 2), keys, values.masked_fill_(~seen[..., None], 0.0), seen)
        return torch.where(empty, own_value.flatten(0, 2).to(y.dtype), y).view(own_value.shape)

    def add_one(self, keys: Tensor, values: Tensor, buckets: Tensor) -> None:
        """Add the entry of one position after `attend_one`; the arguments are those of `add`, with n = 1."""
        assert self.recent is not None
        self.recent.add(buckets.flatten(0, 1).squeeze(-1), self.used)
        self.add(keys, values, buckets)

    def remove(self, order: SortedOrder) -> None:
        """Remove the entries that no later query can find. order: of all entries."""
        batch, heads, rounds, _ = self.buckets.shape
        last = _last_of_bucket(order, self.reach)
        last &= torch.arange(self.used, device=last.device) < order.real_lengths[:, None, None]
        kept = torch.zeros_like(last[:, 0])
        for number in range(rounds):
            places = order.positions[:, number].long()
            kept |= torch.zeros_like(kept).scatter_(1, places, last[:, number])
        counts = kept.sum(1)
        size = int(counts.max())
        row, place = kept.nonzero(as_tuple=True)
        rank = torch.arange(row.shape[0], device=row.device) - (counts.cumsum(0) - counts)[row]
        # All rows end with the same position, so padding comes first.
        column = size - counts[row] + rank
        source = torch.zeros(batch * heads, size, dtype=torch.int64, device=row.device)
        source[row, column] = place
        padding = torch.arange(size, device=row.device) < (size - counts)[:, None]
        first = torch.arange(batch * heads, device=row.device)[:, None] * self.keys.shape[2]
        entries = (source + first).flatten()
        self.keys, self.values = (
            x.flatten(0, 2).index_select(0, entries).view(batch, heads, size, -1)
            for x in (self.keys, self.values)
        )
        source = source.view(batch, heads, 1, size).expand(-1, -1, rounds, -1)
        padding = padding.view(batch, heads, 1, size)
        self.buckets = self.buckets.gather(3, source).masked_fill_(padding, -1)
        self.padded, self.used, self.recent = bool(padding.any()), size, None
        self.most = size + max(SPARE, size // 4)

    def fork(self, sequences: Tensor) -> LSHCache:
        """A copy for some of the sequences; see AttentionLayer."""
        # With room for the next tokens, which saves copying all again.
        room = self.most - self.used
        return LSHCache(
            self.rotations,
            self.reach,
            _extended(self.keys, self.used, room, 2, sequences),
            _extended(self.values, self.used, room, 2, sequences),
            _extended(self.buckets, self.used, room, 3, sequences),
            self.last_value.index_select(0, sequences),
            self.most,
            self.used,
            self.padded,
            None if self.recent is None else self.recent.fork(sequences),
        )


def _last_of_bucket(order: SortedOrder, reach: int) -> Tensor:
    """(rows, rounds, length) bool: whether a slot is among the last `reach` of its bucket."""
    last = torch.ones_like(order.buckets, dtype=torch.bool)
    last[..., :-reach] = order.buckets[..., reach:] != order.buckets[..., :-reach]
    return last


def _indices(buckets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Indices of a bucket (rows, rounds) of each row and round in tensors (rows, rounds, buckets, ...)."""
    row = torch.arange(buckets.shape[0], device=buckets.device)[:, None]
    return row, torch.arange(buckets.shape[1], device=buckets.device), buckets


def _extended(x: Tensor, used: int, extra: int, dim: int, sequences: Tensor | None = None) -> Tensor:
    """A copy of the first `used` elements along `dim`, with room for `extra` more; of some sequences, or of all."""
    shape = list(x.shape)
    shape[dim] = used + extra
    if sequences is not None:
        shape[0] = len(sequences)
    larger = x.new_empty(shape)
    target, source = larger.narrow(dim, 0, used), x.narrow(dim, 0, used)
    if sequences is None:
        target.copy_(source)
    else:
        torch.index_select(source, 0, sequences, out=target)
    return larger
