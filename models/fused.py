"""Elementwise work of a block on a GPU, each in one pass over memory, in Triton.

What is special: a step of a deep, narrow model is bound by the bytes it moves, and torch's operations move each number
five to ten times where once would do (a rounding to fixed point is five of them). Sums have one order: the same input
gives the same bits. Everything is computed in fp32 and rounded once.

The callers in reversible, layers, positions and chance ask `fits`, and have the same in plain torch.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megabase.models import gpu
from megabase.models.gpu import FUSED, jit, padded, random_bits, tl, triton

WIDEST = 8192
"""Of a norm, whose row is held in registers."""

BLOCK = 2048
"""Numbers that a program passes over at once."""

PROGRAMS = 1024
"""That sum a weight's gradient, at the most: each leaves one row of partial sums."""


def supports(x: Tensor) -> bool:
    """Whether these kernels compute with x: on a GPU, with triton, in one of the dtypes."""
    return x.is_cuda and gpu.available() and x.dtype in gpu.DTYPES


# The streams.


def add_to_stream(
    stream: Tensor | None, branch: Tensor, sign: int, scale: float, limit: float, alarm: Tensor | None
) -> Tensor:
    """stream + sign · round(scale · branch), int32, of branch's shape; stream None: 0. Rounds to even, saturates.

    alarm: a scalar fp32 that becomes NaN if a number of the branch is not within ±limit, or one of the result not
    within ±limit · scale.
    """
    branch = branch.contiguous()
    assert stream is None or (stream.shape == branch.shape and stream.is_contiguous())
    result = torch.empty(branch.shape, dtype=torch.int32, device=branch.device)
    n = branch.numel()
    with torch.cuda.device_of(branch):
        _add_to_stream[(triton.cdiv(n, BLOCK),)](
            *(branch, branch if stream is None else stream, result, result if alarm is None else alarm, n),
            *(scale, limit, round(limit * scale)),
            SIGN=0 if stream is None else sign,
            WATCH=alarm is not None,
            BLOCK=BLOCK,
            **FUSED,
        )
    return result


def decode(stream: Tensor, scale: float) -> Tensor:
    """stream (int32) in fp32, times scale. (torch.mul would multiply in the default dtype.)"""
    x, n = torch.empty(stream.shape, dtype=torch.float32, device=stream.device), stream.numel()
    with torch.cuda.device_of(stream):
        _decode[(triton.cdiv(n, BLOCK),)](stream, x, n, scale, BLOCK=BLOCK, **FUSED)
    return x


# The norm.


def norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Layer norm, or RMS norm if there is no bias, of x (..., dim) in weight's dtype. dim is WIDEST at the most."""
    return _Norm.apply(x, weight, bias, eps)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        x = x.contiguous()
        ctx.eps, ctx.layer = eps, bias is not None
        ctx.save_for_backward(x, weight)
        y = torch.empty(x.shape, dtype=weight.dtype, device=x.device)
        width = x.shape[-1]
        rows, tile = x.numel() // width, _tile(width)
        with torch.cuda.device_of(x):
            _norm[(triton.cdiv(rows, tile["ROWS"]),)](
                *(x, weight, weight if bias is None else bias, y, rows, width, eps),
                LAYER=ctx.layer,
                **tile,
                **FUSED,
            )
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad, grad_x = grads[0].contiguous(), torch.empty_like(x)
        width = x.shape[-1]
        rows, tile = x.numel() // width, _tile(width)
        steps, programs = _share(triton.cdiv(rows, tile["ROWS"]))
        sums = torch.empty(2, programs, width, dtype=torch.float32, device=x.device)
        with torch.cuda.device_of(x):
            _norm_backward[(programs,)](
                *(x, weight, grad, grad_x, sums, rows, width, ctx.eps, steps, programs),
                LAYER=ctx.layer,
                **tile,
                **FUSED,
            )
        grad_weight, grad_bias = sums.sum(1).to(weight.dtype)
        return grad_x, grad_weight, grad_bias if ctx.layer else None, None


def _tile(width: int) -> dict[str, int]:
    """Rows that a program holds at once, and their padded width."""
    return {
        "PAD": padded(width),
        "ROWS": max(1, BLOCK // padded(width)),
        "num_warps": 4 if width <= 2048 else 8,
    }


def _share(blocks: int) -> tuple[int, int]:
    """How many blocks a program goes over, and how many programs there are: PROGRAMS at the most, 1 at least."""
    steps = max(1, triton.cdiv(blocks, PROGRAMS))
    return steps, max(1, triton.cdiv(blocks, steps))


# Dropout.


def dropout(x: Tensor, rate: float, keys: Tensor) -> Tensor:
    """models.chance.dropout of x (batch, ...), keys (batch,) int64. Keeps the keys for the backward pass, no mask."""
    return _Dropout.apply(x, rate, keys)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rate: float, keys: Tensor) -> Tensor:
        ctx.rate = rate
        ctx.save_for_backward(keys)
        return _drop(x, rate, keys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _drop(grads[0], ctx.rate, ctx.saved_tensors[0]), None, None


def _drop(x: Tensor, rate: float, keys: Tensor) -> Tensor:
    x = x.contiguous()
    y, n = torch.empty_like(x), x[0].numel()
    # As megabase.models.chance.keep has it; the factor as x's dtype holds it.
    least, kept = round(rate * 2.0**32) - (1 << 31), torch.tensor(1.0 / (1.0 - rate), dtype=x.dtype).item()
    with torch.cuda.device_of(x):
        _dropout[(x.shape[0] * triton.cdiv(n, BLOCK),)](x, keys, y, n, least, kept, BLOCK=BLOCK, **FUSED)
    return y


# Normal numbers.


def normals(key: int, n: int, quantiles: Tensor) -> Tensor:
    """megabase.models.chance.normals: n of the 2^16 quantiles, chosen by hashing key (int64) and their place."""
    result = torch.empty(n, dtype=quantiles.dtype, device=quantiles.device)
    with torch.cuda.device_of(quantiles):
        _normals[(triton.cdiv(n, BLOCK),)](quantiles, result, key, n, BLOCK=BLOCK, **FUSED)
    return result


# Rotary positions.


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(a · cos − b · sin, b · cos + a · sin) of the halves a, b of x (batch, heads, length, d), in any order in memory
    if elements of a row lie side by side; cos, sin (length, d / 2). The result lies in memory as x does."""
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
    rows, tile = x.numel() // d, max(1, BLOCK // (2 * half))
    with torch.cuda.device_of(x):
        _turn[(triton.cdiv(rows, tile),)](
            *(x, cos, sin, y, sign, rows, heads, length, *x.stride()[:3], *y.stride()[:3]),
            HALF=d // 2,
            PAD=half,
            ROWS=tile,
            **FUSED,
        )
    return y


# The short convolution.


def convolve(x: Tensor, weight: Tensor, before: int) -> Tensor:
    """y[i] = Σ over taps of weight[tap] · x[i + tap − before], 0 beyond the ends: x (batch, length, dim), weight (taps,
    dim)."""
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
            _convolve[(batch * triton.cdiv(length, _TOKENS), triton.cdiv(width, _CHANNELS))](
                *(x, weight, y, length, width, before), TAPS=len(weight), T=_TOKENS, C=_CHANNELS, **FUSED
            )
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad, grad_x = grads[0].contiguous(), torch.empty_like(x)
        batch, length, width = x.shape
        blocks = batch * triton.cdiv(length, _TOKENS)
        (steps, programs), taps = _share(blocks), len(weight)
        sums = torch.empty(programs, taps, width, dtype=torch.float32, device=x.device)
        with torch.cuda.device_of(x):
            _convolve_backward[(programs, triton.cdiv(width, _CHANNELS))](
                *(x, weight, grad, grad_x, sums, blocks, length, width, ctx.before, steps),
                TAPS=taps,
                LINES=triton.next_power_of_2(taps),
                T=_TOKENS,
                C=_CHANNELS,
                **FUSED,
            )
        return grad_x, sums.sum(0).to(weight.dtype), None


_TOKENS, _CHANNELS = 16, 128
"""Of a tile."""

# From here on the code runs on the device. Addresses are 64 bits wide. What `do_not_specialize` names is compiled in
# nowhere: a new length needs no new code.


@jit()
def _rounded(x):
    """To the nearest whole number, ties to even: fp32."""
    size = tl.abs(x)
    # 2^23 and above are whole; below, adding it leaves no bits for a fraction.
    whole = (size + 8388608.0) - 8388608.0
    whole = tl.where(size < 8388608.0, whole, size)
    return tl.where(x < 0.0, -whole, whole)


@jit(do_not_specialize=["edge"])
def _add_to_stream(
    branch,
    stream,
    result,
    alarm,
    n,
    scale,
    limit,
    edge,
    SIGN: tl.constexpr,
    WATCH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = place < n
    x = tl.load(branch + place, mask=there, other=0.0).to(tl.float32)
    # 2147483520 is the largest fp32 below 2^31.
    y = tl.minimum(tl.maximum(_rounded(x * scale), -2147483648.0), 2147483520.0).to(tl.int32)
    if SIGN == 1:
        y = tl.load(stream + place, mask=there, other=0) + y
    if SIGN == -1:
        y = tl.load(stream + place, mask=there, other=0) - y
    tl.store(result + place, y, mask=there)
    if WATCH:
        fine = (tl.abs(x) < limit) & (y > -edge) & (y < edge)
        if tl.min(fine.to(tl.int32), axis=0) == 0:
            # Whoever finds something writes the same.
            tl.store(alarm, float("nan"))


@jit()
def _decode(stream, result, n, scale, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = place < n
    tl.store(result + place, tl.load(stream + place, mask=there, other=0).to(tl.float32) * scale, mask=there)


@jit()
def _load(x, at, there):
    return tl.load(x + at, mask=there, other=0.0).to(tl.float32)


@jit()
def _normalise(x, there, width, eps, LAYER: tl.constexpr):
    """x (ROWS, PAD) without its mean (LAYER) and with unit variance, and what it was multiplied by."""
    if LAYER:
        x = tl.where(there, x - (tl.sum(x, axis=1) / width)[:, None], 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / width + eps)
    return x * scale[:, None], scale


@jit(do_not_specialize=["rows"])
def _norm(x, weight, bias, y, rows, width, eps, LAYER: tl.constexpr, PAD: tl.constexpr, ROWS: tl.constexpr):
    """ROWS rows of `width` numbers."""
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, PAD)
    there = (row < rows)[:, None] & (column < width)[None, :]
    at = row.to(tl.int64)[:, None] * width + column[None, :]
    normal, _ = _normalise(_load(x, at, there), there, width, eps, LAYER)
    result = normal * _load(weight, column, column < width)[None, :]
    if LAYER:
        result += _load(bias, column, column < width)[None, :]
    tl.store(y + at, result.to(y.dtype.element_ty), mask=there)


@jit(do_not_specialize=["rows", "steps", "programs"])
def _norm_backward(
    x, weight, grad, grad_x, sums, rows, width, eps, steps, programs,
    LAYER: tl.constexpr, PAD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """`steps` times ROWS rows; sums (2, programs, width): what weight and bias get of them."""
    program, column = tl.program_id(0), tl.arange(0, PAD)
    of_width = column < width
    factor = _load(weight, column, of_width)
    of_weight, of_bias = tl.zeros((PAD,), dtype=tl.float32), tl.zeros((PAD,), dtype=tl.float32)
    for step in range(steps):
        row = (program * steps + step) * ROWS + tl.arange(0, ROWS)
        there = (row < rows)[:, None] & of_width[None, :]
        at = row.to(tl.int64)[:, None] * width + column[None, :]
        normal, scale = _normalise(_load(x, at, there), there, width, eps, LAYER)
        pull = _load(grad, at, there)
        of_weight += tl.sum(pull * normal, axis=0)
        of_bias += tl.sum(pull, axis=0)
        pull *= factor[None, :]
        change = pull - normal * (tl.sum(pull * normal, axis=1) / width)[:, None]
        if LAYER:
            change -= (tl.sum(pull, axis=1) / width)[:, None]
        tl.store(grad_x + at, (change * scale[:, None]).to(grad_x.dtype.element_ty), mask=there)
    place = sums + program.to(tl.int64) * width + column
    tl.store(place, of_weight, mask=of_width)
    tl.store(place + programs.to(tl.int64) * width, of_bias, mask=of_width)


@jit(do_not_specialize=["least"])
def _dropout(x, keys, y, n, least, kept, BLOCK: tl.constexpr):
    """BLOCK numbers of one sample of n."""
    blocks = tl.cdiv(n, BLOCK)
    sample = tl.program_id(0) // blocks
    place = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    there = place < n
    at = sample.to(tl.int64) * n + place
    key = tl.load(keys + sample)
    bits = random_bits(place.to(tl.uint32), key.to(tl.uint32), (key >> 32).to(tl.uint32))
    factor = tl.where(bits.to(tl.int32, bitcast=True) >= least, kept, 0.0)
    tl.store(y + at, (_load(x, at, there) * factor).to(y.dtype.element_ty), mask=there)


@jit(do_not_specialize=["key", "n"])
def _normals(quantiles, result, key, n, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    key = key.to(tl.int64)
    bits = random_bits(place.to(tl.uint32), key.to(tl.uint32), (key >> 32).to(tl.uint32))
    chosen = tl.load(quantiles + (bits >> 16).to(tl.int32))
    tl.store(result + place, chosen, mask=place < n)


@jit(do_not_specialize=["rows", "heads", "length"])
def _turn(
    x, cos, sin, y, sign, rows, heads, length, x_batch, x_head, x_step, y_batch, y_head, y_step,
    HALF: tl.constexpr, PAD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS rows of 2 · HALF numbers, counted (batch, length, heads), as projections leave them."""
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, PAD)
    there = (row < rows)[:, None] & (column < HALF)[None, :]
    head, place = (row % heads).to(tl.int64), row // heads
    batch, pos = (place // length).to(tl.int64), place % length
    at = pos.to(tl.int64)[:, None] * HALF + column[None, :]
    c, s = _load(cos, at, there), _load(sin, at, there) * sign
    x_at = (batch * x_batch + head * x_head + pos.to(tl.int64) * x_step)[:, None] + column[None, :]
    y_at = (batch * y_batch + head * y_head + pos.to(tl.int64) * y_step)[:, None] + column[None, :]
    a, b = _load(x, x_at, there), _load(x, x_at + HALF, there)
    tl.store(y + y_at, (a * c - b * s).to(y.dtype.element_ty), mask=there)
    tl.store(y + y_at + HALF, (b * c + a * s).to(y.dtype.element_ty), mask=there)


@jit(do_not_specialize=["length", "before"])
def _convolve(x, weight, y, length, width, before, TAPS: tl.constexpr, T: tl.constexpr, C: tl.constexpr):
    """T tokens of one sample, C channels."""
    blocks = tl.cdiv(length, T)
    first = (tl.program_id(0) // blocks).to(tl.int64) * length
    pos, channel = tl.program_id(0) % blocks * T + tl.arange(0, T), tl.program_id(1) * C + tl.arange(0, C)
    here = channel < width
    total = tl.zeros((T, C), dtype=tl.float32)
    for tap in tl.static_range(TAPS):
        source = pos + (tap - before)
        there = ((source >= 0) & (source < length))[:, None] & here[None, :]
        at = (first + source)[:, None] * width + channel[None, :]
        total += _load(weight + tap * width, channel, here)[None, :] * _load(x, at, there)
    at = (first + pos)[:, None] * width + channel[None, :]
    tl.store(y + at, total.to(y.dtype.element_ty), mask=(pos < length)[:, None] & here[None, :])


@jit(do_not_specialize=["blocks", "length", "before", "steps"])
def _convolve_backward(
    x, weight, grad, grad_x, sums, blocks, length, width, before, steps,
    TAPS: tl.constexpr, LINES: tl.constexpr, T: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """`steps` times T tokens; sums (programs, TAPS, width): what the weight gets of them."""
    channel, line = tl.program_id(1) * C + tl.arange(0, C), tl.arange(0, LINES)
    here = channel < width
    of_weight = tl.zeros((LINES, C), dtype=tl.float32)
    each = tl.cdiv(length, T)
    for step in range(steps):
        block = tl.program_id(0) * steps + step
        first = (block // each).to(tl.int64) * length
        pos = block % each * T + tl.arange(0, T)
        inside = pos < tl.where(block < blocks, length, 0)
        at = (first + pos)[:, None] * width + channel[None, :]
        pull = _load(grad, at, inside[:, None] & here[None, :])
        total = tl.zeros((T, C), dtype=tl.float32)
        for tap in tl.static_range(TAPS):
            source = pos + (tap - before)
            there = (inside & (source >= 0) & (source < length))[:, None] & here[None, :]
            shifted = _load(x, (first + source)[:, None] * width + channel[None, :], there)
            of_weight += tl.where(line[:, None] == tap, tl.sum(pull * shifted, axis=0)[None, :], 0.0)
            source = pos - (tap - before)
            there = (inside & (source >= 0) & (source < length))[:, None] & here[None, :]
            shifted = _load(grad, (first + source)[:, None] * width + channel[None, :], there)
            total += _load(weight + tap * width, channel, here)[None, :] * shifted
        tl.store(grad_x + at, total.to(grad_x.dtype.element_ty), mask=inside[:, None] & here[None, :])
    place = sums + (tl.program_id(0).to(tl.int64) * TAPS + line)[:, None] * width + channel[None, :]
    tl.store(place, of_weight, mask=(line < TAPS)[:, None] & here[None, :])
