"""The small parts every branch is made of. Each draws its own weights, from torch's default generator."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """A linear map, weights from N(0, (gain² / inputs)), no bias unless asked for (then zero)."""

    def __init__(self, inputs: int, outputs: int, *, gain: float = 1.0, bias: bool = False) -> None:
        super().__init__(inputs, outputs, bias=bias)
        nn.init.normal_(self.weight, std=gain * inputs**-0.5)
        if bias:
            nn.init.zeros_(self.bias)


class Norm(nn.Module):
    """Layer or RMS norm over the last axis. Computes in fp32, returns the weights' dtype, so that a model
    whose weights are bf16 computes in bf16 behind fp32 streams."""

    def __init__(self, dim: int, kind: str, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim)) if kind == "layer" else None

    def forward(self, x: Tensor) -> Tensor:
        shape = self.weight.shape
        if x.dtype != torch.float64:
            x = x.float()
        weight = self.weight.to(x.dtype)
        if self.bias is None:
            y = F.rms_norm(x, shape, weight, eps=self.eps)
        else:
            y = F.layer_norm(x, shape, weight, self.bias.to(x.dtype), eps=self.eps)
        return y.to(self.weight.dtype)


class ShortConvolution(nn.Module):
    """Depthwise convolution over the length: (batch, length, dim) -> the same. It starts as the identity plus
    noise. Causal: a token sees itself and width - 1 before it; else it is centred."""

    def __init__(self, dim: int, width: int, *, causal: bool) -> None:
        super().__init__()
        self.before = width - 1 if causal else (width - 1) // 2
        self.after = width - 1 - self.before
        weight = torch.randn(width, dim) * 0.5 * width**-0.5
        weight[self.before] += 1.0
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """mask: (batch, length) bool, True where a token is real: the others count as zero."""
        if mask is not None:
            x = x.masked_fill(~mask[..., None], 0.0)
        length = x.shape[1]
        padded = F.pad(x, (0, 0, self.before, self.after))
        y = padded[:, :length] * self.weight[0]
        for tap in range(1, self.weight.shape[0]):
            y = torch.addcmul(y, padded[:, tap : tap + length], self.weight[tap])
        return y
