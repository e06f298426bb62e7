"""Rotary positions."""

# Device code has no Python types; host functions have all of theirs.
# mypy: allow-untyped-defs

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from megabase.models.fused import blocks
from megabase.models.fused.blocks import load
from megabase.models.gpu import FUSED, padded


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the halves a, b of every row: (a · cos − b · sin, b · cos + a · sin).

    Args:
        x: (batch, heads, length, d), with any strides; rows whose elements do not lie side by side are copied first.
        cos: (length, d / 2).
        sin: (length, d / 2).

    Returns:
        The same shape and strides as x.
    """
    return _Turn.apply(x, cos, sin)


class _Turn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _turned(grads[0], cos, sin, -1.0), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    if x.stride(-1) != 1:
        x = x.contiguous()
    y = torch.empty_like(x)
    _, heads, length, d = x.shape
    half = padded(d // 2)
    rows, tile = x.numel() // d, max(1, blocks.BLOCK // (2 * half))
    with torch.cuda.device_of(x):
        _turn[(triton.cdiv(rows, tile),)](
            *(x, cos, sin, y, sign, rows, heads, length, *x.stride()[:3], *y.stride()[:3]),
            HALF=d // 2,
            PAD=half,
            ROWS=tile,
            **FUSED,
        )
    return y


@triton.jit(do_not_specialize=["rows", "heads", "length"])
def _turn(
    x, cos, sin, y, sign, rows, heads, length, x_batch, x_head, x_step, y_batch, y_head, y_step,
    HALF: tl.constexpr, PAD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS rows of 2 · HALF numbers, counted (batch, length, heads), as projections leave them.

    Rows are fewer than 2^31, numbers may be more: places in x and y are int64.
    """
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, PAD)
    valid = (row < rows)[:, None] & (column < HALF)[None, :]
    head, place = (row % heads).to(tl.int64), row // heads
    batch, position = (place // length).to(tl.int64), place % length
    at = position.to(tl.int64)[:, None] * HALF + column[None, :]
    c, s = load(cos, at, valid), load(sin, at, valid) * sign
    x_at = (batch * x_batch + head * x_head + position.to(tl.int64) * x_step)[:, None] + column[None, :]
    y_at = (batch * y_batch + head * y_head + position.to(tl.int64) * y_step)[:, None] + column[None, :]
    a, b = load(x, x_at, valid), load(x, x_at + HALF, valid)
    tl.store(y + y_at, (a * c - b * s).to(y.dtype.element_ty), mask=valid)
    tl.store(y + y_at + HALF, (b * c + a * s).to(y.dtype.element_ty), mask=valid)
