"""The short convolution over the length, one filter for each channel."""

# Device code has no Python types; host functions have all of theirs.
# mypy: allow-untyped-defs

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from megabase.models.fused.blocks import load, share
from megabase.models.gpu import FUSED

TOKENS, CHANNELS = 16, 128
"""The size of a tile."""


def convolve(x: Tensor, weight: Tensor, before: int) -> Tensor:
    """y[i] = Σ over taps of weight[tap] · x[i + tap − before], with zeros beyond the ends.

    Args:
        x: (batch, length, dim).
        weight: (taps, dim).
        before: Taps before the position itself.

    Returns:
        (batch, length, dim) in x's dtype.
    """
    return _Convolve.apply(x, weight, before)


class _Convolve(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, before: int) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        ctx.before = before
        ctx.save_for_backward(x, weight)
        y = torch.empty_like(x)
        batch, length, width = x.shape
        with torch.cuda.device_of(x):
            _convolve[(batch * triton.cdiv(length, TOKENS), triton.cdiv(width, CHANNELS))](
                *(x, weight, y, length, width, before), TAPS=len(weight), T=TOKENS, C=CHANNELS, **FUSED
            )
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad, grad_x = grads[0].contiguous(), torch.empty_like(x)
        batch, length, width = x.shape
        blocks = batch * triton.cdiv(length, TOKENS)
        (steps, programs), taps = share(blocks), len(weight)
        sums = torch.empty(programs, taps, width, dtype=torch.float32, device=x.device)
        with torch.cuda.device_of(x):
            _convolve_backward[(programs, triton.cdiv(width, CHANNELS))](
                *(x, weight, grad, grad_x, sums, blocks, length, width, ctx.before, steps),
                TAPS=taps,
                LINES=triton.next_power_of_2(taps),
                T=TOKENS,
                C=CHANNELS,
                **FUSED,
            )
        return grad_x, sums.sum(0).to(weight.dtype), None


@triton.jit(do_not_specialize=["length", "before"])
def _convolve(x, weight, y, length, width, before, TAPS: tl.constexpr, T: tl.constexpr, C: tl.constexpr):
    """Convolve C channels of T tokens of one sample."""
    blocks = tl.cdiv(length, T)
    first = (tl.program_id(0) // blocks).to(tl.int64) * length
    position = tl.program_id(0) % blocks * T + tl.arange(0, T)
    channel = tl.program_id(1) * C + tl.arange(0, C)
    exists = channel < width
    total = tl.zeros((T, C), dtype=tl.float32)
    for tap in tl.static_range(TAPS):
        source = position + (tap - before)
        valid = ((source >= 0) & (source < length))[:, None] & exists[None, :]
        at = (first + source)[:, None] * width + channel[None, :]
        total += load(weight + tap * width, channel, exists)[None, :] * load(x, at, valid)
    at = (first + position)[:, None] * width + channel[None, :]
    tl.store(y + at, total.to(y.dtype.element_ty), mask=(position < length)[:, None] & exists[None, :])


@triton.jit(do_not_specialize=["blocks", "length", "before", "steps"])
def _convolve_backward(
    x, weight, grad, grad_x, sums, blocks, length, width, before, steps,
    TAPS: tl.constexpr, LINES: tl.constexpr, T: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The gradient of x for `steps` times T tokens. sums (programs, TAPS, width): their share of weight's gradient."""
    channel, line = tl.program_id(1) * C + tl.arange(0, C), tl.arange(0, LINES)
    exists = channel < width
    of_weight = tl.zeros((LINES, C), dtype=tl.float32)
    blocks_of_sample = tl.cdiv(length, T)
    for step in range(steps):
        block = tl.program_id(0) * steps + step
        first = (block // blocks_of_sample).to(tl.int64) * length
        position = block % blocks_of_sample * T + tl.arange(0, T)
        inside = position < tl.where(block < blocks, length, 0)
        at = (first + position)[:, None] * width + channel[None, :]
        grad_y = load(grad, at, inside[:, None] & exists[None, :])
        total = tl.zeros((T, C), dtype=tl.float32)
        for tap in tl.static_range(TAPS):
            source = position + (tap - before)
            valid = (inside & (source >= 0) & (source < length))[:, None] & exists[None, :]
            shifted = load(x, (first + source)[:, None] * width + channel[None, :], valid)
            of_weight += tl.where(line[:, None] == tap, tl.sum(grad_y * shifted, axis=0)[None, :], 0.0)
            source = position - (tap - before)
            valid = (inside & (source >= 0) & (source < length))[:, None] & exists[None, :]
            shifted = load(grad, (first + source)[:, None] * width + channel[None, :], valid)
            total += load(weight + tap * width, channel, exists)[None, :] * shifted
        tl.store(grad_x + at, total.to(grad_x.dtype.element_ty), mask=inside[:, None] & exists[None, :])
    place = sums + (tl.program_id(0).to(tl.int64) * TAPS + line)[:, None] * width + channel[None, :]
    tl.store(place, of_weight, mask=(line < TAPS)[:, None] & exists[None, :])
