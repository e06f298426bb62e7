"""Small layers that all branches use: linear map, norm, short convolution. Weights are drawn from torch's default
generator."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megabase.models import fused
from megabase.models.device import has_half_products, pieces
from megabase.models.precision import Precision


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear, but never with emulated half precision.

    A CPU without units for half precision emulates its products, ten times slower than in fp32. There this function
    computes in fp32 and returns the half precision that was asked for.

    Args:
        x: (..., inputs).
        weight: (outputs, inputs).
        bias: (outputs,) or None.

    Returns:
        (..., outputs).
    """
    dtype = Precision.current(x.device).compute_dtype(x.dtype)
    if dtype not in (torch.bfloat16, torch.float16) or has_half_products(x.device.type, dtype):
        return F.linear(x, weight, bias)
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(dtype)


class Linear(nn.Linear):
    """A linear map. Weights are drawn from N(0, gain² / inputs); a bias, if wanted, starts at zero."""

    def __init__(self, inputs: int, outputs: int, *, gain: float = 1.0, bias: bool = False) -> None:
        super().__init__(inputs, outputs, bias=bias)
        nn.init.normal_(self.weight, std=gain * inputs**-0.5)
        if bias:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


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

    def forward(self, x: Tensor) -> Tensor:
        shape = self.weight.shape
        if fused.supports(x) and shape[0] <= fused.WIDEST:
            return fused.norm(x, self.weight, self.bias, self.eps)
        if x.dtype != torch.float64:
            x = x.float()
        weight = self.weight.to(x.dtype)
        if self.bias is None:
            y = F.rms_norm(x, shape, weight, eps=self.eps)
        else:
            y = F.layer_norm(x, shape, weight, self.bias.to(x.dtype), eps=self.eps)
        return y.to(self.weight.dtype)


class ShortConvolution(nn.Module):
    """Depthwise convolution over the length, (batch, length, dim) -> the same. It starts as the identity plus noise.

    Args:
        dim: channels.
        width: tokens that an output depends on.
        causal: True: they are the token itself and those before it. False: they are centred on it.
    """

    def __init__(self, dim: int, width: int, *, causal: bool) -> None:
        super().__init__()
        self.before = width - 1 if causal else (width - 1) // 2
        self.after = width - 1 - self.before
        weight = torch.randn(width, dim) * 0.5 * width**-0.5
        weight[self.before] += 1.0
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Convolve. mask: (batch, length) bool, True where a token is real; others count as zero. None: all are."""
        if mask is not None:
            x = x.masked_fill(~mask[..., None], 0.0)
        convolve = fused.convolve if fused.supports(x) else _Convolve.apply
        return convolve(x, self.weight, self.before)


class _Convolve(torch.autograd.Function):
    """y[i] = Σ over taps of weight[tap] · x[i + tap − before]; x is zero outside the sequence.

    x: (batch, length, dim), weight: (width, dim). Computes all taps of one piece of the length, then the next piece.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, before: int) -> Tensor:
        ctx.before = before
        ctx.save_for_backward(x, weight)
        y = torch.empty_like(x)
        for part in pieces(x.shape[1], x.shape[0] * x.shape[2], x.device):
            torch.mul(x[:, part], weight[before], out=y[:, part])
            for tap in (t for t in range(weight.shape[0]) if t != before):
                inside, shifted = _overlap(part, tap - before, x.shape[1])
                y[:, inside].addcmul_(x[:, shifted], weight[tap])
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad, before = grads[0], ctx.before
        grad_x, sums = (
            torch.empty_like(x),
            torch.zeros_like(weight, dtype=torch.promote_types(x.dtype, torch.float32)),
        )
        for part in pieces(x.shape[1], x.shape[0] * x.shape[2], x.device):
            torch.mul(grad[:, part], weight[before], out=grad_x[:, part])
            for tap in range(weight.shape[0]):
                if tap != before:
                    inside, shifted = _overlap(part, before - tap, x.shape[1])
                    grad_x[:, inside].addcmul_(grad[:, shifted], weight[tap])
                inside, shifted = _overlap(part, tap - before, x.shape[1])
                sums[tap] += (grad[:, inside] * x[:, shifted]).sum((0, 1), dtype=sums.dtype)
        return grad_x, sums.to(weight.dtype), None


def _overlap(part: slice, shift: int, length: int) -> tuple[slice, slice]:
    """The positions of `part` for which position + shift exists, and those positions + shift."""
    start, stop = max(part.start, -shift), min(part.stop, length - shift)
    stop = max(start, stop)
    return slice(start, stop), slice(start + shift, stop + shift)
