"""Small layers that attention uses: linear map, short convolution, values ahead. Weights are drawn from torch's default
generator."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megabase.models import fused
from megabase.models.device import has_half_products, pieces
from megabase.models.precision import Precision
from megabase.models.sequence import Around, Part


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


class ShortConvolution(nn.Module):
    """Depthwise convolution over the length, (batch, length, dim) -> the same.

    The taps start random, N(0, 1 / width): so the convolution is a code of the last `width` tokens in which each of
    them matters alike. LSH attention then tells stretches of `width` equal tokens from all others at the first step. (A
    convolution that starts as the identity tells single tokens apart. With the four letters of DNA every bucket then
    holds a quarter of the sequence, and no gradient ever says which match was right: docs/model.md.)

    Args:
        dim: channels.
        width: tokens that an output depends on.
        causal: True: they are the token itself and those before it. False: they are centred on it.
    """

    def __init__(self, dim: int, width: int, *, causal: bool) -> None:
        super().__init__()
        self.before = width - 1 if causal else (width - 1) // 2
        self.after = width - 1 - self.before
        self.weight = nn.Parameter(torch.randn(width, dim) * width**-0.5)

    def forward(self, x: Tensor, mask: Tensor | None, part: Part | None = None) -> Tensor:
        """Convolve.

        Args:
            x: (batch, length, dim).
            mask: (batch, length) bool, True where a token is real; others count as zero. None: all are.
            part: of the sequence, that x is; None: x is all of it.
        """
        if mask is not None:
            x = x.masked_fill(~mask[..., None], 0.0)
        return convolve_part(x, self.weight, self.before, part)


class ValuesAhead(nn.Module):
    """Mixes every value with the value of the next position: a head's own share of each, 1/2 and 1/2 at the start.

    A position that attends to a key at s needs to know what came after s. With shared query-keys it finds a context
    that equals its own, so the value at s is a token that it knows already; the one at s + 1 is the one to predict
    (docs/model.md). This is strictly causal as long as a position attends to earlier keys only.

    Args:
        heads: attention heads.
    """

    def __init__(self, heads: int) -> None:
        super().__init__()
        # A vector, like the scales of a norm: without weight decay.
        self.weight = nn.Parameter(torch.full((2 * heads,), 0.5))

    def forward(self, v: Tensor, mask: Tensor | None, part: Part | None = None) -> Tensor:
        """See `look_ahead`."""
        return look_ahead(v, self.weight, mask, part)

    def pairs(self, v: Tensor) -> Tensor:
        """The mixed values of all positions but the last, which waits for its next one.

        Args:
            v: (batch, heads, n, d).

        Returns:
            (batch, heads, n − 1, d).
        """
        own, following = self.weight.to(v.dtype).view(2, -1, 1, 1)
        return own * v[:, :, :-1] + following * v[:, :, 1:]


def look_ahead(v: Tensor, shares: Tensor, mask: Tensor | None, part: Part | None = None) -> Tensor:
    """Mix every value with that of the next position.

    Args:
        v: (batch, length, heads · d). The last position has no next one: zeros count instead.
        shares: (2 · heads,): of the position's own value for every head, then of the next one's.
        mask: (batch, length) bool, True where a token is real; the values of others count as zero. None: all are.
        part: of the sequence, that v is; None: v is all of it.

    Returns:
        (batch, length, heads · d).
    """
    if mask is not None:
        v = v.masked_fill(~mask[..., None], 0.0)
    each = shares.to(v.dtype).view(2, -1)
    return convolve_part(v, each.repeat_interleave(v.shape[-1] // each.shape[1], dim=1), 0, part)


def convolve_part(x: Tensor, weight: Tensor, before: int, part: Part | None) -> Tensor:
    """`convolve` of the part of a sequence that x is; None: of all of it."""
    if part is None:
        return convolve(x, weight, before)
    around = Around(before, weight.shape[0] - 1 - before)
    first = around.first(part)
    return convolve(part.with_neighbours(x, around), weight, before)[:, first : first + x.shape[1]]


def convolve(x: Tensor, weight: Tensor, before: int) -> Tensor:
    """y[i] = Σ over taps of weight[tap] · x[i + tap − before], for every channel; x is zero outside the sequence.

    Args:
        x: (batch, length, dim).
        weight: (taps, dim).
        before: taps before the position itself.

    Returns:
        (batch, length, dim) in x's dtype.
    """
    return (fused.convolve if fused.supports(x) else _Convolve.apply)(x, weight, before)


class _Convolve(torch.autograd.Function):
    """See `convolve`. Computes all taps of one piece of the length, then the next piece."""

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
