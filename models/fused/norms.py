"""Layer norm and RMS norm, forward and backward."""

# Device code has no Python types; host functions have all of theirs.
# mypy: allow-untyped-defs

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from megabase.models.fused.blocks import block_of_rows, load, share
from megabase.models.gpu import FUSED


def norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Layer norm, or RMS norm if there is no bias, over the last axis.

    Args:
        x: (..., dim), any dtype of `gpu.DTYPES`; dim is `fused.WIDEST` at the most.
        weight: (dim,).
        bias: (dim,), or None.
        eps: Added to the variance.

    Returns:
        (..., dim) in weight's dtype.
    """
    return _Norm.apply(x, weight, bias, eps)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        x = x.contiguous()
        ctx.eps, ctx.layer = eps, bias is not None
        ctx.save_for_backward(x, weight)
        y = torch.empty(x.shape, dtype=weight.dtype, device=x.device)
        width = x.shape[-1]
        rows, settings = x.numel() // width, block_of_rows(width)
        with torch.cuda.device_of(x):
            _norm[(triton.cdiv(rows, settings["ROWS"]),)](
                *(x, weight, weight if bias is None else bias, y, rows, width, eps),
                LAYER=ctx.layer,
                **settings,
                **FUSED,
            )
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad, grad_x = grads[0].contiguous(), torch.empty_like(x)
        width = x.shape[-1]
        rows, settings = x.numel() // width, block_of_rows(width)
        steps, programs = share(triton.cdiv(rows, settings["ROWS"]))
        sums = torch.empty(2, programs, width, dtype=torch.float32, device=x.device)
        with torch.cuda.device_of(x):
            _norm_backward[(programs,)](
                *(x, weight, grad, grad_x, sums, rows, width, ctx.eps, steps, programs),
                LAYER=ctx.layer,
                **settings,
                **FUSED,
            )
        grad_weight, grad_bias = sums.sum(1).to(weight.dtype)
        return grad_x, grad_weight, grad_bias if ctx.layer else None, None


@triton.jit
def _normalise(x, valid, width, eps, LAYER: tl.constexpr):
    """x (ROWS, PAD) without its mean (LAYER) and with unit variance, and the factor that was applied."""
    if LAYER:
        x = tl.where(valid, x - (tl.sum(x, axis=1) / width)[:, None], 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / width + eps)
    return x * scale[:, None], scale


@triton.jit(do_not_specialize=["rows"])
def _norm(x, weight, bias, y, rows, width, eps, LAYER: tl.constexpr, PAD: tl.constexpr, ROWS: tl.constexpr):
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, PAD)
    valid = (row < rows)[:, None] & (column < width)[None, :]
    at = row.to(tl.int64)[:, None] * width + column[None, :]
    normal, _ = _normalise(load(x, at, valid), valid, width, eps, LAYER)
    result = normal * load(weight, column, column < width)[None, :]
    if LAYER:
        result += load(bias, column, column < width)[None, :]
    tl.store(y + at, result.to(y.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=["rows", "steps", "programs"])
def _norm_backward(
    x, weight, grad, grad_x, sums, rows, width, eps, steps, programs,
    LAYER: tl.constexpr, PAD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The gradient of x for `steps` times ROWS rows. sums (2, programs, width): their share for weight and bias."""
    program, column = tl.program_id(0), tl.arange(0, PAD)
    of_width = column < width
    factor = load(weight, column, of_width)
    of_weight, of_bias = tl.zeros((PAD,), dtype=tl.float32), tl.zeros((PAD,), dtype=tl.float32)
    for step in range(steps):
        row = (program * steps + step) * ROWS + tl.arange(0, ROWS)
        valid = (row < rows)[:, None] & of_width[None, :]
        at = row.to(tl.int64)[:, None] * width + column[None, :]
        normal, scale = _normalise(load(x, at, valid), valid, width, eps, LAYER)
        grad_y = load(grad, at, valid)
        of_weight += tl.sum(grad_y * normal, axis=0)
        of_bias += tl.sum(grad_y, axis=0)
        grad_y *= factor[None, :]
        change = grad_y - normal * (tl.sum(grad_y * normal, axis=1) / width)[:, None]
        if LAYER:
            change -= (tl.sum(grad_y, axis=1) / width)[:, None]
        tl.store(grad_x + at, (change * scale[:, None]).to(grad_x.dtype.element_ty), mask=valid)
    place = sums + program.to(tl.int64) * width + column
    tl.store(place, of_weight, mask=of_width)
    tl.store(place + programs.to(tl.int64) * width, of_bias, mask=of_width)
