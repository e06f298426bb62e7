"""LSH attention (paper, section 2): a query attends to keys that hash to the same bucket.

`lsh_attention` is the function to call; it chooses the kernel itself. Queries and keys are one vector: a key is the
query scaled to unit length, and a score is their product without further scale (as in trax and transformers).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megabase.models.attention.heads import (
    AttentionLayer,
    merge_heads,
    output,
    projection,
    split_heads,
)
from megabase.models.attention.kernels import dispatch
from megabase.models.attention.kernels.dispatch import rotate_and_hash, sort_by_hash, unit_keys
from megabase.models.attention.kernels.inputs import Rotations, Rule, SortedOrder, row_mask
from megabase.models.attention.lsh_cache import LSHCache
from megabase.models.call import Call
from megabase.models.chance import Purpose, Seeds, normals
from megabase.models.checks import ConfigError, check_at_least, check_buckets, check_name
from megabase.models.config import DEFAULT_BUCKETS, ReformerConfig
from megabase.models.layer_config import ATTENDS, DUPLICATES, bucket_factors

FEWEST = 8
"""Tokens of the smallest block that always runs in the kernels, which sort the whole cache."""


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
        backend: auto, reference, chunked, native (CPUs, with a C++ compiler), triton or triton-together (GPUs). All
            give the same result.

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
        order = sort_by_hash(qk, rotations, mask, backend=backend)
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


def border_distances(x: Tensor, rotations: Rotations) -> Tensor:
    """How far x is from the nearest border between two buckets.

    Args:
        x: (batch, heads, length, d).
        rotations: of every round and head.

    Returns:
        (batch, heads, rounds, length) fp32: the difference between the largest two elements of [xR, −xR], of the
        factor where it is least, divided by |x| √d, about the size of the terms that rounding changes.
    """
    x = F.normalize(x.float(), dim=-1) * x.shape[-1] ** -0.5
    distances = []
    for number in range(rotations.rounds):
        factors = []
        for rotation in rotations.factors(number):
            rotated = x @ rotation.to(x.device)
            largest = torch.cat((rotated, -rotated), dim=-1).topk(2, dim=-1).values
            factors.append(largest[..., 0] - largest[..., 1])
        distances.append(torch.stack(factors).amin(dim=0))
    return torch.stack(distances, dim=2)


class SortByHash(nn.Module):
    """`sort_by_hash` as a module, so that hooks can measure what was sorted (statistics.py)."""

    def forward(self, qk: Tensor, rotations: Rotations, mask: Tensor | None) -> SortedOrder:
        return sort_by_hash(qk, rotations, mask)


class LSHAttention(AttentionLayer):
    """The layer: query-key and value projections, hashing, attention, output projection.

    It compares content alone: rotary positions do not rotate its query-keys. They would make the score of the same
    content depend on its distance, but content must be found at any distance. (test_learns_to_copy in
    tests/models/test_reformer.py checks this: if query-keys are rotated, the loss jumps whenever the hash changes.)
    """

    OF_NEAR = ("query_key",)

    def __init__(self, config: ReformerConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.sort = SortByHash()
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

    def mix(self, projected: Sequence[Tensor], shares: Tensor | None, call: Call) -> Tensor:
        (qk, v), part = projected, call.part
        qk, v = self.split(qk), self.values(v, shares, call)
        if part is not None:
            qk, v, call = part.to_heads(qk), part.to_heads(v), call.of_all_positions()
        rotations = self.rotations(call.seeds, qk.device).of_heads(call.heads)
        y = self.attend(qk, v, self.sort(qk, rotations, call.mask), call)
        return merge_heads(y if part is None else part.to_positions(y))

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
        return LSHCache.new(self.rotations(seeds, empty.device), lsh.chunk_length, empty)

    def read(self, x: Tensor, near: Tensor, cache: LSHCache, position: int, call: Call) -> Tensor:
        heads = self.config.heads
        qk, v = split_heads(self.query_key(near), heads), split_heads(self.value(x), heads)
        buckets = rotate_and_hash(qk, cache.rotations)
        keys, values = unit_keys(qk), v if self.ahead is None else cache.complete(v, self.ahead)
        # A few tokens are faster one by one, if `recent` is up to date; a single token is expected to have successors.
        length = qk.shape[2]
        if length >= FEWEST or (length > 1 and cache.recent is None):
            cache.add(keys, values, buckets)
            return self.output(merge_heads(cache.attend(qk, self.rule)))
        own_values = v if self.ahead is None else torch.zeros_like(v)
        outputs = []
        for one in (slice(i, i + 1) for i in range(length)):
            entry = keys[:, :, one], values[:, :, one], buckets[..., one]
            outputs.append(
                cache.attend_one(qk[:, :, one], entry[2], own_values[:, :, one], once=self.rule.once)
            )
            cache.add_one(*entry)
        return self.output(merge_heads(torch.cat(outputs, dim=2)))


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
