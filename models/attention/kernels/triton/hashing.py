"""Buckets on a GPU: projection and argmax of all rounds in one kernel, from one reading of x."""

# Device code has no Python types; host functions have all of theirs.
# mypy: allow-untyped-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megabase.models.attention.kernels.inputs import Rotations
from megabase.models.attention.kernels.triton import tiles
from megabase.models.attention.kernels.triton.memory import Rows, load_rows, product, unit_scale
from megabase.models.gpu import FUSED, padded


def hash_positions(
    x: Tensor,
    rotations: Rotations,
    mask: Tensor | None,
    dtype: torch.dtype,
    row_tables: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Hash x (batch, heads, length, d): buckets (batch, heads, rounds, length) of a dtype.

    mask: (batch, length) bool; a position where it is False gets the bucket n_buckets. row_tables: the scales of
    unit keys (rows, length) fp32 and `SortedOrder.real_lengths`, which the same launch fills in; real_lengths only
    without a mask.
    """
    x = x if x.stride(-1) == 1 else x.contiguous()
    batch, heads, length, d = x.shape
    first, second = rotations.halves if len(rotations.halves) == 2 else (*rotations.halves, 0)
    table = rotations.table.to(x.device).contiguous()
    buckets = torch.empty(batch, heads, rotations.rounds, length, dtype=dtype, device=x.device)
    sizes = tiles.HASH
    with torch.cuda.device_of(x):
        hash_kernel[(batch * heads * triton.cdiv(length, sizes.own),)](
            *(x, table, buckets if mask is None else mask.contiguous().view(torch.uint8), buckets),
            *(row_tables or (buckets, buckets)),
            *(*x.stride()[:3], heads, length, rotations.rounds),
            **{"D": d, "PAD": padded(d), "FIRST": first, "FIRST_PAD": padded(first)},
            **{"SECOND": second, "SECOND_PAD": padded(second), "MASKED": mask is not None},
            TABLES=row_tables is not None,
            OWN=sizes.own,
            num_warps=sizes.warps,
            num_stages=sizes.stages,
            **FUSED,
        )
    return buckets


@triton.jit(do_not_specialize=["length", "heads", "rounds"])
def hash_kernel(
    x, table, mask, buckets, key_scales, real_lengths, x_batch, x_head, x_step, heads, length, rounds,
    D: tl.constexpr, PAD: tl.constexpr, FIRST: tl.constexpr, FIRST_PAD: tl.constexpr,
    SECOND: tl.constexpr, SECOND_PAD: tl.constexpr, MASKED: tl.constexpr, TABLES: tl.constexpr,
    OWN: tl.constexpr,
):  # fmt: skip
    """Buckets (batch, heads, rounds, length) of OWN positions of one head, in all rounds.

    FIRST, SECOND: columns of the two factors of the hash; SECOND is 0 if there is one. TABLES: also key_scales, and
    real_lengths if not MASKED.
    """
    blocks = tl.cdiv(length, OWN)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    position = tl.program_id(0) % blocks * OWN + tl.arange(0, OWN)
    valid = position < length
    batch, head = row // heads, row % heads
    vectors = load_rows(Rows(x + batch * x_batch + head * x_head, x_step), position, valid, D, PAD)
    if TABLES:
        tl.store(key_scales + row * length + position, unit_scale(vectors, D), mask=valid)
        if not MASKED:
            tl.store(real_lengths + row, length)
    for number in range(rounds):
        rotation = table + (number * heads + head) * D * (FIRST + SECOND)
        bucket = _factor(vectors, rotation, FIRST + SECOND, D, PAD, FIRST, FIRST_PAD)
        if SECOND:
            other = _factor(vectors, rotation + FIRST, FIRST + SECOND, D, PAD, SECOND, SECOND_PAD)
            bucket += 2 * FIRST * other
        if MASKED:
            is_real = tl.load(mask + batch * length + position, mask=valid, other=0) != 0
            bucket = tl.where(is_real, bucket, 2 * FIRST * (2 * SECOND if SECOND else 1))
        place = buckets + (row * rounds + number) * length + position
        tl.store(place, bucket.to(buckets.dtype.element_ty), mask=valid)


@triton.jit
def _factor(x, table, width, D: tl.constexpr, PAD: tl.constexpr, HALF: tl.constexpr, HALF_PAD: tl.constexpr):
    """argmax([xR, −xR]) of x (OWN, PAD) and R (D, HALF), whose rows are `width` elements apart; the first on ties."""
    line, column = tl.arange(0, PAD), tl.arange(0, HALF_PAD)
    exists = column < HALF
    rotation = tl.load(
        table + line[:, None] * width + column[None, :], mask=(line < D)[:, None] & exists[None, :], other=0.0
    )
    # Drawn rotations are bf16: with x of 16 bits, every single product is exact.
    if x.dtype != rotation.dtype:
        x, rotation = x.to(tl.float32), rotation.to(tl.float32)
    rotated = product(x, rotation)
    most, place = tl.max(tl.where(exists[None, :], rotated, float("-inf")), axis=1, return_indices=True)
    least, opposite = tl.min(tl.where(exists[None, :], rotated, float("inf")), axis=1, return_indices=True)
    # With NaN any column may be returned, those of the padding too: clamp to the last bucket.
    return tl.minimum(tl.where(most >= -least, place, opposite + HALF), 2 * HALF - 1)
