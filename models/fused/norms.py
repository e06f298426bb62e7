"""Layer norm and RMS norm, forward and backward."""

# Device code has no Python types; host functions have all of theirs.
# mypy: allow-untyped-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megabase.models.fused.blocks import block_of_rows, load, share
from megabase.models.gpu import FUSED


def normalised(x: Tensor, unit: float, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Layer norm, or RMS norm if there is no bias, of unit · x, over the last axis.

    Args:
        x: (rows, dim), int32 or any dtype of `gpu.DTYPES`; dim is `fused.WIDEST` at the most.
        unit: What the numbers of x are multiplied with first.
        weight: (dim,).
        bias: (dim,), or None.
        eps: Added to the variance.

    Returns:
        (rows, dim) in weight's dtype.
    """
    x = x.contiguous()
    y = torch.empty(x.shape, dtype=weight.dtype, device=x.device)
    rows, width = x.shape
    settings = block_of_rows(width)
    with torch.cuda.device_of(x):
        _norm[(triton.cdiv(rows, settings["ROWS"]),)](
            *(x, weight, weight if bias is None else bias, y, rows, width, eps, unit),
            LAYER=bias is not None,
            **settings,
            **FUSED,
        )
    return y


def norm_gradients(
    x: Tensor, unit: float, weight: Tensor, bias: Tensor | None, eps: float, grad: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of `normalised`, given that of its result.

    Args:
        x, unit, weight, bias, eps: As in `normalised`.
        grad: (rows, dim).

    Returns:
        The gradient of unit · x, (rows, dim) in x's dtype (fp32 if that is int32); those of weight and bias, (2, dim)
        fp32.
    """
    x, grad = x.contiguous(), grad.contiguous()
    dtype = x.dtype if x.dtype.is_floating_point else torch.float32
    grad_x = torch.empty(x.shape, dtype=dtype, device=x.device)
    rows, width = x.shape
    settings = block_of_rows(width)
    steps, programs = share(triton.cdiv(rows, settings["ROWS"]))
    sums = torch.empty(2, programs, width, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _norm_backward[(programs,)](
            *(x, weight, grad, grad_x, sums, rows, width, eps, unit, steps, programs),
            LAYER=bias is not None,
            **settings,
            **FUSED,
        )
    return grad_x, sums.sum(1)


@triton.jit
def _normalise(x, valid, width, eps, LAYER: tl.constexpr):
    """x (ROWS, PAD) without its mean (LAYER) and with unit variance, and the factor that was applied."""
    if LAYER:
        x = tl.where(valid, x - (tl.sum(x, axis=1) / width)[:, None], 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / width + eps)
    return x * scale[:, None], scale


@triton.jit(do_not_specialize=["rows"])
def _norm(
    x, weight, bias, y, rows, width, eps, unit, LAYER: tl.constexpr, PAD: tl.constexpr, ROWS: tl.constexpr
):
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, PAD)
    valid = (row < rows)[:, None] & (column < width)[None, :]
    at = row.to(tl.int64)[:, None] * width + column[None, :]
    normal, _ = _normalise(load(x, at, valid) * unit, valid, width, eps, LAYER)
    result = normal * load(weight, column, column < width)[None, :]
    if LAYER:
        result += load(bias, column, column < width)[None, :]
    tl.store(y + at, result.to(y.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=["rows", "steps", "programs"])
def _norm_backward(
    x, weight, grad, grad_x, sums, rows, width, eps, unit, steps, programs,
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
        normal, scale = _normalise(load(x, at, valid) * unit, valid, width, eps, LAYER)
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
