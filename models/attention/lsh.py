"""LSH attention (paper, section 2): queries meet the keys that hash to the same bucket.

`lsh_attention` is the function to call; what computes it is decided behind it. Queries and keys are one vector;
a key is the query scaled to unit length, a score is their product, without further scale (so do trax and
transformers, whose arithmetic this is).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from megabase.models.attention.heads import merge_heads, output, pair_dropout, projection, split_heads
from megabase.models.attention.kernels import dispatch
from megabase.models.attention.kernels.dispatch import rotate_and_hash, sort_by_hash
from megabase.models.attention.kernels.inputs import Rotations, Rule, SortedOrder, row_mask
from megabase.models.call import Call
from megabase.models.chance import Purpose, Seeds, normals
from megabase.models.checks import SINGLE_ROTATION, ConfigError, check_buckets, check_name
from megabase.models.config import ATTENDS, DEFAULT_BUCKETS, DUPLICATES, ReformerConfig


def lsh_attention(
    qk: Tensor,
    v: Tensor,
    *,
    rounds: int,
    chunk_length: int,
    causal: bool,
    seed: int,
    attend: str = "window",
    duplicates: str = "average",
    n_buckets: int | None = None,
    mask: Tensor | None = None,
    buckets: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention of every position over the keys it meets in `rounds` rounds of hashing.

    qk, v: (batch, heads, length, head_dim), any float dtype; any length from 1.
    chunk_length: positions. `attend="window"`: a position meets, in every round, the last `chunk_length`
        positions of its own bucket (not causal: as many on both sides); what it sees depends on nothing later.
        `attend="chunk"`: its own chunk of `chunk_length` seats in the order (bucket, position), and the one before.
    seed: the hash is a function of (seed, heads, head_dim, n_buckets, round), and of nothing else.
    duplicates: "average" weighs a key by the number of rounds it was met in; "once" makes the result exactly
        softmax over the union of what was met.
    n_buckets: buckets of a round, even (a multiple of 4 above 128); None = 64, whatever the length.
    mask: (batch, length) bool, True where a position is real. The others are as if they were not there: nobody
        meets them, they shift nothing, and their output is zero.
    buckets: (batch, heads, rounds, length) integers, to be used instead of hashing.
    backend: auto, reference, chunked, native (CPUs, with a C++ compiler) or triton (GPUs). All give the same result.

    A position meets itself only if it meets nothing else in any round. Returns (batch, heads, length, head_dim)
    in v's dtype. Raises ConfigError for settings and shapes that cannot work.
    """
    _check(qk, v, rounds, chunk_length, mask, buckets)
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
    rule = Rule(chunk_length, attend, causal, once=duplicates == "once", shared=True)
    return dispatch.sorted_attention(qk, None, v, order, rule, backend=backend)


def hash_buckets(x: Tensor, *, rounds: int, n_buckets: int, seed: int) -> Tensor:
    """Angular hash of x (batch, heads, length, d): (batch, heads, rounds, length) int32 in [0, n_buckets).

    h(x) = argmax([xR, −xR]) with R random, one for every head and round (paper, section 2; Andoni et al. 2015).
    Above 128 buckets the hash is made of two such factors, and R of two smaller parts. Computed in fp32.
    """
    heads, d = x.shape[1], x.shape[-1]
    rotations = draw_rotations(heads, d, rounds=rounds, n_buckets=n_buckets, seed=seed, device=x.device)
    return rotate_and_hash(x, rotations)


def draw_rotations(
    heads: int, d: int, *, rounds: int, n_buckets: int, seed: int, device: torch.device | None = None
) -> Rotations:
    """R of every round, head and factor: N(0, 1) in bf16, a function of the arguments, the same on every device."""
    halves = tuple(factor // 2 for factor in bucket_factors(n_buckets))
    shape = rounds, heads, d, sum(halves)
    return Rotations(normals(seed, math.prod(shape), device).view(shape), halves)


def bucket_factors(n_buckets: int) -> list[int]:
    """n_buckets itself, or the two even factors closest to each other if one rotation would be too wide."""
    if n_buckets <= SINGLE_ROTATION:
        return [n_buckets]
    half = next(f for f in range(math.isqrt(n_buckets // 4), 0, -1) if n_buckets // 4 % f == 0)
    return [2 * half, n_buckets // (2 * half)]


class LSHAttention(nn.Module):
    """The layer: query-key and value projections, hashing, attention, output projection.

    It compares content alone: rotary positions do not turn its query-keys. Turned, the same content would score
    differently at every distance, which is what long-range matching must not do (tests/models/test_reformer.py,
    `test_learns_to_copy`: with rotary the loss jumps with every new hash, without it falls steadily).
    """

    def __init__(self, config: ReformerConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.rule = Rule(
            reach=config.lsh.chunk_length,
            attend=config.lsh.attend,
            causal=config.causal,
            once=config.lsh.duplicates == "once",
            shared=True,
        )
        self.query_key = projection(config)
        self.value = projection(config)
        self.output = output(config)

    def project(self, x: Tensor, near: Tensor) -> tuple[Tensor, Tensor]:
        """Query-keys and values (batch, heads, length, d)."""
        heads = self.config.heads
        return split_heads(self.query_key(near), heads), split_heads(self.value(x), heads)

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
        dropout = pair_dropout(self.config, self.layer, call, v.shape[0], v.device)
        return dispatch.sorted_attention(qk, None, v, order, self.rule, dropout)

    def forward(self, x: Tensor, near: Tensor, call: Call) -> Tensor:
        qk, v = self.project(x, near)
        order = sort_by_hash(qk, self.rotations(call.seeds, qk.device), call.mask)
        return self.output(merge_heads(self.attend(qk, v, order, call)))


def _check(
    qk: Tensor, v: Tensor, rounds: int, chunk_length: int, mask: Tensor | None, buckets: Tensor | None
) -> None:
    if qk.dim() != 4 or qk.shape[:3] != v.shape[:3] or v.dim() != 4 or qk.shape[2] < 1:
        raise ConfigError(
            f"qk has shape {tuple(qk.shape)}, v {tuple(v.shape)}: both must be (batch, heads, length, head_dim), "
            "of the same batch, heads and length, which is at least 1"
        )
    for name, value in (("rounds", rounds), ("chunk_length", chunk_length)):
        if value < 1:
            raise ConfigError(f"{name}={value} must be at least 1")
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
