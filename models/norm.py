"""Layer norm and RMS norm, of a tensor or of residual streams, a piece of the positions at a time."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megabase.models import fused
from megabase.models.streams import Rows, Source, scaled

CPU_PIECE, GPU_PIECE = 1 << 20, 1 << 26
"""Numbers of which copies in fp32 exist at once. The order in which gradients of weights are summed depends on it."""


class Norm(nn.Module):
    """Layer or RMS norm over the last axis, (..., dim) -> the same.

    Computes in fp32 and returns the dtype of its weights: a model with bf16 weights computes in bf16, although its
    streams are fp32.

    Args:
        dim: width of the last axis.
        kind: `layer` or `rms`.
        eps: added to the variance.
    """

    def __init__(self, dim: int, kind: str, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim)) if kind == "layer" else None

    def forward(self, x: Tensor, source: Source | None = None) -> Tensor:
        """See `norm`."""
        return norm(x, self.weight, self.bias, self.eps, source)


def norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, source: Source | None = None) -> Tensor:
    """Layer norm, or RMS norm if there is no bias, over the last axis.

    Args:
        x: (..., dim); with a source: its link.
        weight: (dim,).
        bias: (dim,), or None.
        eps: added to the variance.
        source: read instead of x.

    Returns:
        (..., dim) in weight's dtype.
    """
    return _Norm.apply(x, weight, bias, eps, source)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, source: Source | None
    ) -> Tensor:
        ctx.eps, ctx.source = eps, source
        ctx.save_for_backward(x if source is None else None, weight, bias)
        rows, kernels = Rows(x, source), _kernels(weight)
        parts = _parts(rows, weight.device)
        if len(parts) == 1:
            return kernels.normalised(*rows.numbers(parts[0]), weight, bias, eps).view(rows.shape)
        y = torch.empty(rows.shape, dtype=weight.dtype, device=weight.device)
        for part in parts:
            y.view(-1, y.shape[-1])[part] = kernels.normalised(*rows.numbers(part), weight, bias, eps)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        rows, kernels = Rows(x, ctx.source), _kernels(weight)
        if ctx.source is not None:
            ctx.source.begin()
        grad = grads[0].reshape(-1, grads[0].shape[-1])
        sums = torch.zeros(2, *weight.shape, dtype=rows.dtype, device=weight.device)
        for part in _parts(rows, weight.device):
            numbers, unit = rows.numbers(part)
            of_rows, of_weights = kernels.norm_gradients(numbers, unit, weight, bias, ctx.eps, grad[part])
            if ctx.needs_input_grad[0]:
                rows.add_gradients(part, of_rows)
            sums += of_weights
        of_weight, of_bias = sums.to(weight.dtype)
        of_x = rows.gradient(weight.device) if ctx.needs_input_grad[0] else None
        return of_x, of_weight, None if bias is None else of_bias, None, None


def _parts(rows: Rows, device: torch.device) -> list[slice]:
    """The pieces in which rows are computed."""
    piece = CPU_PIECE if device.type == "cpu" else GPU_PIECE
    return list(rows.parts(max(1, piece // rows.shape[-1])))


def _kernels(weight: Tensor) -> Any:
    """The functions `normalised` and `norm_gradients` for weights like this one."""
    return fused if fused.supports(weight) and weight.shape[0] <= fused.WIDEST else _Plain


class _Plain:
    """models/fused/norms.py in torch's operations: see there."""

    @staticmethod
    def normalised(x: Tensor, unit: float, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        x = scaled(x, unit)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        shape, wide = weight.shape, weight.to(x.dtype)
        if bias is None:
            return F.rms_norm(x, shape, wide, eps=eps).to(weight.dtype)
        return F.layer_norm(x, shape, wide, bias.to(x.dtype), eps=eps).to(weight.dtype)

    @staticmethod
    def norm_gradients(
        x: Tensor, unit: float, weight: Tensor, bias: Tensor | None, eps: float, grad: Tensor
    ) -> tuple[Tensor, Tensor]:
        x = scaled(x.detach(), unit)
        x = x.to(torch.promote_types(x.dtype, torch.float32)).requires_grad_()
        weight = weight.detach().to(x.dtype).requires_grad_()
        bias = None if bias is None else bias.detach().to(x.dtype).requires_grad_()
        with torch.enable_grad():
            y = _Plain.normalised(x, 1.0, weight, bias, eps)
        leaves = [x, weight] if bias is None else [x, weight, bias]
        of_x, of_weight, *of_bias = torch.autograd.grad(y, leaves, grad.to(x.dtype))
        return of_x, torch.stack((of_weight, of_bias[0] if of_bias else torch.zeros_like(of_weight)))
