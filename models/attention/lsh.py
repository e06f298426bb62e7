"""LSH attention (paper, section 2): a query attends to keys that hash to the same bucket.

`lsh_attention` is the function to call; it chooses the kernel itself. Queries and keys are one vector: a key is the
query scaled to unit length, and a score is their product without further scale (as in trax and transformers).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from megabase.models.attention.heads import (
    AttentionLayer,
    Waiting,
    attend_to_cached,
    merge_heads,
    output,
    projection,
    split_heads,
    with_last,
)
from megabase.models.attention.kernels import dispatch
from megabase.models.attention.kernels.dispatch import rotate_and_hash, sort_by_hash, unit_keys
from megabase.models.attention.kernels.inputs import Rotations, Rule, SortedOrder, row_mask
from megabase.models.attention.kernels.reference import first_occurrences
from megabase.models.call import Call
from megabase.models.chance import Purpose, Seeds, normals
from megabase.models.checks import SINGLE_ROTATION, ConfigError, check_at_least, check_buckets, check_name
from megabase.models.config import DEFAULT_BUCKETS, ReformerConfig
from megabase.models.layer_config import ATTENDS, DUPLICATES


def lsh_attention(
    qk: Tensor,
    v: Tensor,
    *,
    rounds: int,
    chunk_length: int,
    causal: bool,
    seed: int,
    attend: str = "window",
    own: bool = True,
    duplicates: str = "average",
    n_buckets: int | None = None,
    mask: Tensor | None = None,
    buckets: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention of every position to the keys that it finds in `rounds` rounds of hashing.

    A position attends to itself only if it finds no other key in any round (`own`).

    Args:
        qk: queries, which are keys too, (batch, heads, length, head_dim), any float dtype, any length from 1.
        v: values, (batch, heads, length, head_dim), whose head_dim may differ.
        rounds: number of rounds of hashing.
        chunk_length: positions. `attend="window"`: in every round, a position finds the last `chunk_length`
            positions of its own bucket (not causal: as many on both sides); the result depends on nothing later.
            `attend="chunk"`: the sorted sequence (by bucket, then position) is cut into chunks of this length; a
            position finds its own chunk and the one before.
        own: False: a position never attends to itself, and outputs zero if it finds no other key in any round.
        causal: whether a position attends to no later one.
        seed: the hash is a function of (seed, heads, head_dim, n_buckets, round), and of nothing else.
        attend: `window` or `chunk`.
        duplicates: `average` weighs a key by the number of rounds in which it was found; `once` makes the result
            exactly softmax over the union of the keys found.
        n_buckets: number of buckets of a round, even (a multiple of 4 above 128); None = 64 at any length.
        mask: (batch, length) bool, True where a position is real. The others change nothing for the real ones, and
            their output is zero.
        buckets: (batch, heads, rounds, length) integers from 0 on, to use instead of hashing.
        backend: auto, reference, chunked, native (CPUs, with a C++ compiler) or triton (GPUs). All give the same
            result.

    Returns:
        (batch, heads, length, head_dim) in v's dtype.

    Raises:
        ConfigError: a setting or shape cannot work, or the backend cannot run with these tensors.
    """
    _check_inputs(qk, v, rounds, chunk_length, mask, buckets)
    check_name("attend", attend, ATTENDS)
    check_name("duplicates", duplicates, DUPLICATES)
    check_name("backend", backend, dispatch.BACKENDS)
    if buckets is None:
        n_buckets = DEFAULT_BUCKETS if n_buckets is None else n_buckets
        check_buckets(n_buckets, "n_buckets")
        shape = qk.shape[1], qk.shape[3]
        rotations = draw_rotations(*shape, rounds=rounds, n_buckets=n_buckets, seed=seed, device=qk.device)
        order = sort_by_hash(qk, rotations, mask)
    else:
        order = dispatch.sort_by_bucket(buckets.flatten(0, 1), None, row_mask(mask, qk.shape[1]))
    rule = Rule(chunk_length, attend, causal, once=duplicates == "once", own="alone" if own else "never")
    return dispatch.sorted_attention(qk, None, v, order, rule, backend=backend)


def hash_buckets(x: Tensor, *, rounds: int, n_buckets: int, seed: int) -> Tensor:
    """Angular hash: h(x) = argmax([xR, −xR]) with a random R for every head and round (paper, section 2).

    Above 128 buckets the hash is the product of two such factors, each with a smaller R of its own (Andoni et al.
    2015). Computed in fp32.

    Args:
        x: (batch, heads, length, d).
        rounds: number of rounds of hashing.
        n_buckets: number of buckets of a round, even (a multiple of 4 above 128).
        seed: the hash is a function of (seed, heads, d, n_buckets, round).

    Returns:
        (batch, heads, rounds, length) int32 in [0, n_buckets).
    """
    heads, d = x.shape[1], x.shape[-1]
    rotations = draw_rotations(heads, d, rounds=rounds, n_buckets=n_buckets, seed=seed, device=x.device)
    return rotate_and_hash(x, rotations)


def draw_rotations(
    heads: int, d: int, *, rounds: int, n_buckets: int, seed: int, device: torch.device | None = None
) -> Rotations:
    """Draw R of every round, head and factor: N(0, 1) in bf16, a function of the arguments, the same on any device."""
    halves = tuple(factor // 2 for factor in bucket_factors(n_buckets))
    shape = rounds, heads, d, sum(halves)
    return Rotations(normals(seed, math.prod(shape), device).view(shape), halves)


def bucket_factors(n_buckets: int) -> list[int]:
    """[n_buckets], or if one rotation would be too wide, the two even factors that are closest to each other."""
    if n_buckets <= SINGLE_ROTATION:
        return [n_buckets]
    half = next(f for f in range(math.isqrt(n_buckets // 4), 0, -1) if n_buckets // 4 % f == 0)
    return [2 * half, n_buckets // (2 * half)]


@dataclass
class LSHCache:
    """The last `chunk_length` entries of every bucket, in any order.

    Attributes:
        rotations: the rotations that hash query-keys.
        positions: (rows, rounds, buckets, chunk_length) int64, rows = batch × heads; −1 where the cache has no entry.
        keys, values: (rows, rounds, buckets, chunk_length, d).
        waiting: the query-key and value of the last entry, until its value is complete.
        waiting_buckets: (batch, heads, rounds, n) int32, the buckets of its query-key; n as in `Waiting`.
    """

    rotations: Rotations
    positions: Tensor
    keys: Tensor
    values: Tensor
    waiting: Waiting
    waiting_buckets: Tensor

    def fill(self, qk: Tensor, v: Tensor, order: SortedOrder) -> None:
        """Keep the last entries of every bucket of a sequence that starts at position 0.

        Args:
            qk, v: (rows, length, d).
            order: the sorted order of these rows.
        """
        reach = self.keys.shape[3]
        last = torch.ones_like(order.buckets, dtype=torch.bool)
        last[..., :-reach] = order.buckets[..., reach:] != order.buckets[..., :-reach]
        row, number, slot = last.nonzero(as_tuple=True)
        position = order.positions[row, number, slot].long()
        # At most `reach` entries of a bucket are kept, in adjacent slots: no two get the same index.
        index = (row, number, order.buckets[row, number, slot], slot % reach)
        self.positions[index] = position
        self.keys[index] = unit_keys(qk)[row, position].to(self.keys.dtype)
        self.values[index] = v[row, position].to(self.values.dtype)

    def add(self, qk: Tensor, v: Tensor, buckets: Tensor, position: int) -> None:
        """Add the entry of one position. It replaces the oldest of its bucket in every round.

        Args:
            qk, v: (rows, d).
            buckets: (rows, rounds), the buckets of the query-key.
            position: the position of the entry.
        """
        bucket = self._indices(buckets)
        index = (*bucket, self.positions[bucket].argmin(dim=-1))
        self.positions[index] = position
        self.keys[index] = unit_keys(qk.to(self.keys.dtype))[:, None]
        self.values[index] = v.to(self.values.dtype)[:, None]

    def attend(self, qk: Tensor, buckets: Tensor, own_value: Tensor, *, once: bool) -> Tensor:
        """Attention of one position to the entries of its buckets.

        Args:
            qk: (rows, d).
            buckets: (rows, rounds), the buckets of the query-key.
            own_value: (rows, d), the output of a position that finds no entry.
            once: whether a key found in several rounds counts once.

        Returns:
            (rows, d).
        """
        bucket = self._indices(buckets)
        positions = self.positions[bucket].flatten(1)
        seen = positions >= 0
        values = self.values[bucket].flatten(1, 2).masked_fill(~seen[..., None], 0.0)
        empty = ~seen.any(dim=-1, keepdim=True)
        if once:
            seen = first_occurrences(positions, seen)
        y = attend_to_cached(qk, self.keys[bucket].flatten(1, 2), values, seen)
        return torch.where(empty, own_value.to(y.dtype), y)

    def _indices(self, buckets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Indices of a bucket (rows, rounds) of every row and round in the cache's tensors."""
        row = torch.arange(buckets.shape[0], device=buckets.device)[:, None]
        return row, torch.arange(buckets.shape[1], device=buckets.device), buckets


class LSHAttention(AttentionLayer):
    """The layer: query-key and value projections, hashing, attention, output projection.

    It compares content alone: rotary positions do not rotate its query-keys. They would make the score of the same
    content depend on its distance, but content must be found at any distance. (test_learns_to_copy in
    tests/models/test_reformer.py checks this: if query-keys are rotated, the loss jumps whenever the hash changes.)
    """

    def __init__(self, config: ReformerConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.rule = Rule(
            reach=config.lsh.chunk_length,
            attend=config.lsh.attend,
            causal=config.causal,
            once=config.lsh.duplicates == "once",
            own="alone" if self.ahead is None else "never",
        )
        self.query_key = projection(config, config.gain("lsh"))
        self.value = projection(config)
        self.output = output(config)

    def forward(self, x: Tensor, near: Tensor, call: Call) -> Tensor:
        qk = split_heads(self.query_key(near), self.config.heads)
        order = sort_by_hash(qk, self.rotations(call.seeds, qk.device), call.mask)
        return self.output(merge_heads(self.attend(qk, self.values(x, call.mask), order, call)))

    def rotations(self, seeds: Seeds, device: torch.device) -> Rotations:
        """The rotations that hash the query-keys of this layer."""
        config = self.config
        return draw_rotations(
            config.heads,
            config.width,
            rounds=config.lsh.rounds,
            n_buckets=config.buckets,
            seed=seeds.number(Purpose.HASH, self.layer),
            device=device,
        )

    def attend(self, qk: Tensor, v: Tensor, order: SortedOrder, call: Call) -> Tensor:
        """Attention of all positions in sorted order: qk and v (batch, heads, length, d) -> the same."""
        dropout = self.pair_dropout(call, v.shape[0], v.device)
        return dispatch.sorted_attention(qk, None, v, order, self.rule, dropout)

    def new_cache(self, batch: int, seeds: Seeds) -> LSHCache:
        self.check_causal()
        lsh, empty = self.config.lsh, self.no_keys(batch)
        if lsh.attend != "window":
            raise ConfigError(
                f"model.lsh.attend={lsh.attend}: later tokens change what earlier ones attend to, so such a model "
                "cannot generate; train one with attend=window"
            )
        shape = (batch * self.config.heads, lsh.rounds, self.config.buckets, lsh.chunk_length)
        # Keys and values are not zeroed: so a CPU takes memory only for the buckets that are used.
        keys = empty.new_empty(*shape, self.config.width)
        return LSHCache(
            rotations=self.rotations(seeds, empty.device),
            positions=torch.full(shape, -1, device=empty.device),
            keys=keys,
            values=torch.empty_like(keys),
            waiting=Waiting(empty, empty),
            waiting_buckets=torch.empty(
                *empty.shape[:2], lsh.rounds, 0, dtype=torch.int32, device=empty.device
            ),
        )

    def read(self, x: Tensor, near: Tensor, cache: LSHCache, position: int, call: Call) -> Tensor:
        heads = self.config.heads
        qk, v = split_heads(self.query_key(near), heads), split_heads(self.value(x), heads)
        buckets = rotate_and_hash(qk, cache.rotations)
        complete = buckets
        if self.ahead is not None:
            complete = torch.cat((cache.waiting_buckets, buckets), dim=3)
            cache.waiting_buckets, complete = complete[..., -1:].clone(), complete[..., :-1]
        keys, values = cache.waiting.complete(qk, v, self.ahead)
        if qk.shape[2] > 1:
            sort = partial(dispatch.sort_by_bucket, n_buckets=cache.rotations.n_buckets, mask=None)
            cache.fill(keys.flatten(0, 1), values.flatten(0, 1), sort(complete.flatten(0, 1)))
            order = sort(buckets.flatten(0, 1))
            return self.output(merge_heads(self.attend(qk, with_last(values, qk), order, call)))
        entry = keys.flatten(0, 2), values.flatten(0, 2), complete.flatten(0, 1).flatten(1)
        if self.ahead is not None and position > 0:
            cache.add(*entry, position - 1)
        own_value = v if self.ahead is None else torch.zeros_like(v)
        own_buckets = buckets.flatten(0, 1).squeeze(-1)
        y = cache.attend(qk.flatten(0, 2), own_buckets, own_value.flatten(0, 2), once=self.rule.once)
        if self.ahead is None:
            cache.add(*entry, position)
        return self.output(merge_heads(y.view(v.shape)))


def _check_inputs(
    qk: Tensor, v: Tensor, rounds: int, chunk_length: int, mask: Tensor | None, buckets: Tensor | None
) -> None:
    if qk.dim() != 4 or qk.shape[:3] != v.shape[:3] or v.dim() != 4 or qk.shape[2] < 1:
        raise ConfigError(
            f"qk has shape {tuple(qk.shape)}, v {tuple(v.shape)}: both must be (batch, heads, length, head_dim) "
            "with the same batch, heads and length, and a length of at least 1"
        )
    check_at_least(1, "rounds", rounds)
    check_at_least(1, "chunk_length", chunk_length)
    batch, heads, length, _ = qk.shape
    if mask is not None and (mask.shape != (batch, length) or mask.dtype != torch.bool):
        raise ConfigError(
            f"mask is {mask.dtype} of shape {tuple(mask.shape)}: it must be bool of shape {(batch, length)}"
        )
    if buckets is not None and buckets.shape != (batch, heads, rounds, length):
        raise ConfigError(
            f"buckets have shape {tuple(buckets.shape)}: they must be (batch, heads, rounds, length) "
            f"= {(batch, heads, rounds, length)}"
        )
