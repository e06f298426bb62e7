"""Device functions of all kernels here: loading and storing rows, products, partial sums of rounds.

Slots, positions, buckets and chunks are int32. What is added to an address has 64 bits: length · d · rows may be larger
than 2^31.
"""

# Device code has no Python types.
# mypy: allow-untyped-defs

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from megabase.models.fused.chance import random_bits

WIDEN = tl.constexpr(not isinstance(random_bits, triton.JITFunction))
"""Whether products are computed in fp32: Triton's interpreter multiplies bf16 matrices as if they were integers. The
products of bf16 numbers are exact in fp32."""

LOG2_E = tl.constexpr(1.4426950408889634)
"""Scores are multiplied by this: exp(s) = 2^(s · log2 e), and GPUs compute powers of 2."""


class Rows(NamedTuple):
    """A matrix of one row of the batch: the address of its first row, and the elements from one row to the next."""

    data: Any
    step: Any


class Dropout(NamedTuple):
    """Dropout of the attention weights of one row.

    key: the row's key. least: a weight is kept if its hashed bits are at least this. kept: the factor of a kept weight.
    """

    key: Any
    least: Any
    kept: Any


@triton.jit
def product(a, b):
    """a @ b in fp32. Operands of fp32 take three products of tf32, which keep 22 bits of each."""
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="tf32x3")


@triton.jit
def add_product(acc, a, b):
    """acc + a @ b in fp32, as `product` computes it."""
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="tf32x3")


@triton.jit
def pair_scale(q_position, k_position, dropout):
    """`PairDropout.scale` of pairs of positions, whose shapes broadcast."""
    low, high = dropout.key.to(tl.uint32), (dropout.key >> 32).to(tl.uint32)
    bits = random_bits(q_position.to(tl.uint32), low, high)
    bits = random_bits(bits ^ k_position.to(tl.uint32), low, high)
    return tl.where(bits.to(tl.int32, bitcast=True) >= dropout.least, dropout.kept, 0.0)


@triton.jit
def load_rows(x, index, valid, WIDTH: tl.constexpr, PAD: tl.constexpr):
    """Rows of x by number: (rows, PAD); 0 where not valid, and beyond WIDTH."""
    column = tl.arange(0, PAD)
    mask = valid[:, None]
    if WIDTH != PAD:
        mask = mask & (column < WIDTH)[None, :]
    return tl.load(x.data + index.to(tl.int64)[:, None] * x.step + column[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(x, index, valid, y, WIDTH: tl.constexpr, PAD: tl.constexpr):
    """Store y (rows, PAD) in rows of x by number, where valid."""
    column = tl.arange(0, PAD)
    mask = valid[:, None]
    if WIDTH != PAD:
        mask = mask & (column < WIDTH)[None, :]
    place = x.data + index.to(tl.int64)[:, None] * x.step + column[None, :]
    tl.store(place, y.to(x.data.dtype.element_ty), mask=mask)


@triton.jit
def unit_scale(x, WIDTH: tl.constexpr):
    """The factors that make unit keys of rows x: 1 / √(Σ x² + 1e-6 · WIDTH), as `dispatch.unit_keys` has them."""
    x = x.to(tl.float32)
    return tl.rsqrt(tl.sum(x * x, axis=1) + 1e-6 * WIDTH)


@triton.jit
def load_numbers(table, index, valid):
    """Entries of a table of integers, as int32; 0 where not valid."""
    return tl.load(table + index, mask=valid, other=0).to(tl.int32)


@triton.jit
def reload_numbers(table, index, valid):
    """load_numbers again from memory, so that nothing computed from the first load must stay in registers."""
    return tl.load(table + index, mask=valid, other=0, volatile=True).to(tl.int32)


@triton.jit
def begin_sums(
    partial, position, valid,
    FIRST: tl.constexpr, OWN: tl.constexpr, WIDTH: tl.constexpr, PAD: tl.constexpr,
):  # fmt: skip
    """The sums that earlier rounds left at these positions: fp32 (OWN, PAD); zeros in the first round."""
    if FIRST:
        return tl.zeros((OWN, PAD), dtype=tl.float32)
    return load_rows(partial, position, valid, WIDTH, PAD)


@triton.jit
def finish_sums(
    partial, result, position, valid, y, LAST: tl.constexpr, WIDTH: tl.constexpr, PAD: tl.constexpr
):
    """Store y (OWN, PAD): the last round in the result, the others for the next round."""
    if LAST:
        store_rows(result, position, valid, y, WIDTH, PAD)
    else:
        store_rows(partial, position, valid, y, WIDTH, PAD)
