"""megabase/models/chance.py on the device: its hash, its dropout and its normal numbers, equal to the last bit.

tests/models/test_fused.py compares each with the function in models/chance.py that it mirrors.
"""

# Device code has no Python types; host functions have all of theirs.
# mypy: allow-untyped-defs

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from megabase.models.fused.blocks import BLOCK, load
from megabase.models.gpu import FUSED


@triton.jit
def random_bits(counter, low, high):
    """`chance.random_bits`, with the key in two halves; all uint32."""
    bits = counter + low
    bits ^= bits >> 16
    bits *= 0x7FEB352D
    bits += high
    bits ^= bits >> 15
    bits *= 0x846CA68B
    bits ^= bits >> 16
    return bits


def dropout(x: Tensor, rate: float, keys: Tensor, first: int = 0) -> Tensor:
    """`chance.dropout` of x (batch, ...) with keys (batch,) int64. Saves the keys, not the mask.

    first: the place in the sample of x's first number.
    """
    return _Dropout.apply(x, rate, keys, first)


def normals(key: int, n: int, quantiles: Tensor) -> Tensor:
    """`chance.normals`: n of the 2^16 quantiles, chosen by hashing the key (int64) and each number's place."""
    result = torch.empty(n, dtype=quantiles.dtype, device=quantiles.device)
    with torch.cuda.device_of(quantiles):
        _normals[(triton.cdiv(n, BLOCK),)](quantiles, result, key, n, BLOCK=BLOCK, **FUSED)
    return result


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rate: float, keys: Tensor, first: int) -> Tensor:
        ctx.rate, ctx.first = rate, first
        ctx.save_for_backward(keys)
        return _drop(x, rate, keys, first)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _drop(grads[0], ctx.rate, ctx.saved_tensors[0], ctx.first), None, None, None


def _drop(x: Tensor, rate: float, keys: Tensor, first: int) -> Tensor:
    x = x.contiguous()
    y, n = torch.empty_like(x), x[0].numel()
    # The comparison is that of `chance.keep`; the factor is rounded to x's dtype, as there.
    least, kept = round(rate * 2.0**32) - (1 << 31), torch.tensor(1.0 / (1.0 - rate), dtype=x.dtype).item()
    with torch.cuda.device_of(x):
        _dropout[(x.shape[0] * triton.cdiv(n, BLOCK),)](
            x, keys, y, n, first, least, kept, BLOCK=BLOCK, **FUSED
        )
    return y


@triton.jit(do_not_specialize=["n", "first", "least"])
def _dropout(x, keys, y, n, first, least, kept, BLOCK: tl.constexpr):
    """Dropout of BLOCK numbers of one sample, which has n; x has those from place `first` of the sample on."""
    blocks = tl.cdiv(n.to(tl.int64), BLOCK)  # n + BLOCK may exceed 2^31
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    inside = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = inside < n
    at = sample * n + inside
    place = inside + first
    # `chance._bits_of_places`: the bits above 32 change the key; they are zero for places below 2^32.
    key = tl.load(keys + sample) ^ ((place >> 32) * -7046029254386353131)
    bits = random_bits(place.to(tl.uint32), key.to(tl.uint32), (key >> 32).to(tl.uint32))
    factor = tl.where(bits.to(tl.int32, bitcast=True) >= least, kept, 0.0)
    tl.store(y + at, (load(x, at, valid) * factor).to(y.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=["key", "n"])
def _normals(quantiles, result, key, n, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    key = key.to(tl.int64)
    bits = random_bits(place.to(tl.uint32), key.to(tl.uint32), (key >> 32).to(tl.uint32))
    chosen = tl.load(quantiles + (bits >> 16).to(tl.int32))
    tl.store(result + place, chosen, mask=place < n)
