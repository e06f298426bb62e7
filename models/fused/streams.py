"""The residual streams in fixed point: adding the output of a branch, and decoding."""

# Device code has no Python types; host functions have all of theirs.
# mypy: allow-untyped-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megabase.models.fused.blocks import BLOCK
from megabase.models.gpu import FUSED


def add_to_stream(
    stream: Tensor | None,
    branch: Tensor,
    sign: int,
    scale: float,
    limit: float,
    invalid: Tensor | None,
    result: Tensor | None = None,
) -> Tensor:
    """stream + sign · round(scale · branch): rounds to even, saturates.

    Args:
        stream: int32 of branch's shape; None stands for zeros.
        branch: Any shape, bf16, fp16 or fp32.
        sign: 1 or −1.
        scale: Units of the stream in 1.
        limit: Largest magnitude allowed, of the branch; of the result in units of 1 / scale.
        invalid: Scalar fp32 that becomes NaN if a number is not within ±limit; None checks nothing.
        result: Where the result is written, which may be `stream`; None: a new tensor.

    Returns:
        The result, int32 of branch's shape.
    """
    branch = branch.contiguous()
    assert stream is None or (stream.shape == branch.shape and stream.is_contiguous())
    if result is None:
        result = torch.empty(branch.shape, dtype=torch.int32, device=branch.device)
    n = branch.numel()
    with torch.cuda.device_of(branch):
        _add_to_stream[(triton.cdiv(n, BLOCK),)](
            *(
                branch,
                branch if stream is None else stream,
                result,
                result if invalid is None else invalid,
                n,
            ),
            *(scale, limit, round(limit * scale)),
            SIGN=0 if stream is None else sign,
            CHECK=invalid is not None,
            BLOCK=BLOCK,
            **FUSED,
        )
    return result


def decode(stream: Tensor, scale: float) -> Tensor:
    """The stream (int32) in fp32, times scale. (torch.mul would multiply in the default dtype.)"""
    x, n = torch.empty(stream.shape, dtype=torch.float32, device=stream.device), stream.numel()
    with torch.cuda.device_of(stream):
        _decode[(triton.cdiv(n, BLOCK),)](stream, x, n, scale, BLOCK=BLOCK, **FUSED)
    return x


@triton.jit
def _rounded(x):
    """To the nearest integer, ties to even: fp32."""
    size = tl.abs(x)
    # Numbers from 2^23 on are integers. Adding 2^23 to a smaller one leaves no bits for a fraction.
    integer = (size + 8388608.0) - 8388608.0
    integer = tl.where(size < 8388608.0, integer, size)
    return tl.where(x < 0.0, -integer, integer)


@triton.jit(do_not_specialize=["edge"])
def _add_to_stream(
    branch, stream, result, invalid, n, scale, limit, edge,
    SIGN: tl.constexpr, CHECK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK numbers. edge: limit in units of the stream."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = place < n
    x = tl.load(branch + place, mask=valid, other=0.0).to(tl.float32)
    # 2147483520 is the largest fp32 below 2^31.
    y = tl.minimum(tl.maximum(_rounded(x * scale), -2147483648.0), 2147483520.0).to(tl.int32)
    if SIGN == 1:
        y = tl.load(stream + place, mask=valid, other=0) + y
    if SIGN == -1:
        y = tl.load(stream + place, mask=valid, other=0) - y
    tl.store(result + place, y, mask=valid)
    if CHECK:
        fine = (tl.abs(x) < limit) & (y > -edge) & (y < edge)
        if tl.min(fine.to(tl.int32), axis=0) == 0:
            # Several programs may store here: all of them store NaN.
            tl.store(invalid, float("nan"))


@triton.jit
def _decode(stream, result, n, scale, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = place < n
    x = tl.load(stream + place, mask=valid, other=0).to(tl.float32)
    tl.store(result + place, x * scale, mask=valid)
