"""The two residual streams of a reversible stack: their arithmetic, and how they are read.

A stream is int32 in units of 2^-16, but a norm computes in floating point. A floating-point copy of a long sequence's
streams, and another for their gradients, would need as much memory as the streams themselves. So no such copy is made:
a norm reads a `Source`, a piece of the positions at a time, and its backward pass adds the gradients, a piece at a
time, to those that the source holds (norm.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from megabase.models import fused
from megabase.models.device import pieces, slices

SCALE = 65536.0
"""Units of a fixed-point stream in 1.0."""

LIMIT = 16384.0
"""Absolute value beyond which the next addition could wrap."""

MOVED = 1 << 26
"""Numbers that are moved between host memory and device at a time."""


class FixedPoint:
    """Streams as int32 in units of 1 / SCALE. On a GPU each function passes over memory once.

    The argument `invalid` is a scalar fp32. It becomes NaN if a number is not finite or beyond ±LIMIT. The host does
    not wait for the device.
    """

    UNIT = 1.0 / SCALE
    """The value of 1 in a stream."""

    @staticmethod
    def encode(x: Tensor, invalid: Tensor | None = None) -> Tensor:
        """Round x to the nearest unit (ties to even), int32; saturates at the ends of the range."""
        if fused.supports(x):
            return fused.add_to_stream(None, x, 1, SCALE, LIMIT, invalid)
        stream = torch.empty(x.shape, dtype=torch.int32, device=x.device)
        flat, source = stream.view(-1), x.reshape(-1)
        for part in pieces(flat.shape[0], 1, x.device):
            flat[part] = _rounded(source[part])
        if invalid is not None:
            FixedPoint.check_range(x, stream, invalid)
        return stream

    @staticmethod
    def decode(stream: Tensor) -> Tensor:
        """The fp32 value of a stream. Beyond ±256 its last bits are rounded, the same way every time."""
        if stream.is_cuda:
            return fused.decode(stream, FixedPoint.UNIT)
        return stream.to(torch.float32).mul_(FixedPoint.UNIT)

    @classmethod
    def add_(cls, stream: Tensor, output: Tensor, invalid: Tensor) -> None:
        """Add a branch's output to a stream of the same shape, in place."""
        for here, part in on_device(stream, output):
            if fused.supports(part):
                fused.add_to_stream(here, part, 1, SCALE, LIMIT, invalid, result=here)
            else:
                here.add_(cls.encode(part))
                cls.check_range(part, here, invalid)

    @classmethod
    def subtract_(cls, stream: Tensor, output: Tensor) -> None:
        """The inverse of `add_`: the stream before the branch's output was added."""
        for here, part in on_device(stream, output):
            if fused.supports(part):
                fused.add_to_stream(here, part, -1, SCALE, LIMIT, None, result=here)
                continue
            numbers = here.view(-1)
            for piece in pieces(numbers.shape[0], 1, here.device):
                numbers[piece] -= _rounded(part.reshape(-1)[piece])

    @staticmethod
    def check_range(x: Tensor, stream: Tensor, invalid: Tensor) -> None:
        """Set `invalid` to NaN if x (floating point) or stream (int32) leaves the range."""
        low, high = torch.aminmax(x)
        bottom, top = torch.aminmax(stream)
        edge = round(LIMIT * SCALE)
        fine = (low > -LIMIT) & (high < LIMIT) & (bottom > -edge) & (top < edge)
        invalid += torch.where(fine, 0.0, torch.nan)


def _rounded(x: Tensor) -> Tensor:
    """x in units of a stream, rounded to the nearest one: int32. 2147483520 is the largest fp32 below 2^31."""
    return (x.float() * SCALE).round_().clamp_(-2147483648.0, 2147483520.0).to(torch.int32)


class FloatingPoint:
    """Streams as fp32: what a reversible network usually does. Inversion is not exact; for comparison."""

    UNIT = 1.0

    @staticmethod
    def encode(x: Tensor, invalid: Tensor | None = None) -> Tensor:
        return x.to(torch.float32, copy=True)

    @staticmethod
    def decode(stream: Tensor) -> Tensor:
        return stream.clone()

    @classmethod
    def add_(cls, stream: Tensor, output: Tensor, invalid: Tensor) -> None:
        for here, part in on_device(stream, output):
            here.add_(cls.encode(part))

    @classmethod
    def subtract_(cls, stream: Tensor, output: Tensor) -> None:
        for here, part in on_device(stream, output):
            here.sub_(cls.encode(part))


def in_host_memory(stream: Tensor, device: torch.device) -> bool:
    """Whether a stream, or its gradients, are kept in host memory while `device` computes."""
    return stream.device != device


def host_copy(stream: Tensor) -> Tensor:
    """A copy in host memory, from which and to which a GPU copies without waiting."""
    copy = torch.empty(stream.shape, dtype=stream.dtype, pin_memory=stream.is_cuda)
    return copy.copy_(stream, non_blocking=True)


def wait_for_copies(stored: Tensor, device: torch.device) -> None:
    """Wait until a tensor in host memory holds what a GPU copies to it. Call it before the host itself reads one."""
    if device.type == "cuda" and in_host_memory(stored, device):
        torch.cuda.current_stream(device).synchronize()


def on_device(stored: Tensor, other: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Pieces of a tensor (batch, length, width) that may be in host memory, to be changed in place where `other` is.

    Yields:
        A piece of `stored` on the device of `other`, and the same piece of `other`, (n, width) each. Both tensors
        themselves, if they are on one device.
    """
    if not in_host_memory(stored, other.device):
        yield stored, other
        return
    width = stored.shape[-1]
    flat, others = stored.view(-1, width), other.reshape(-1, width)
    for part in slices(flat.shape[0], max(1, MOVED // width)):
        here = flat[part].to(other.device, non_blocking=True)
        yield here, others[part]
        flat[part].copy_(here, non_blocking=True)


def moved(x: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """x on a device in a dtype. What comes from host memory is converted on the device, a piece at a time."""
    if not in_host_memory(x, device):
        return x.to(dtype)
    result = torch.empty(x.shape, dtype=dtype, device=device)
    flat, into = x.view(-1, x.shape[-1]), result.view(-1, x.shape[-1])
    for part in slices(flat.shape[0], max(1, MOVED // x.shape[-1])):
        into[part] = flat[part].to(device, non_blocking=True)
    return result


Arithmetic = type[FixedPoint] | type[FloatingPoint]


class Source:
    """One stream, or both side by side, to be read in pieces; and the gradients of what was read.

    The streams are not tensors of the autograd graph; a scalar 0, their link, stands for them. The function that makes
    the streams returns the link. A function that reads the source takes the link as an input, and its backward pass
    calls `add_gradients`. So autograd runs the backward pass of the function that made the streams after those of all
    readers, and it calls `take`.

    Attributes:
        arithmetic: of the streams.
        device: that computes. The streams and their gradients may be in host memory.
        shape: (batch, length, width): width is dim for one stream, 2·dim for both.
        dtype: of what is read, and of the gradients: fp32 at least.
        start: what both streams of a stack started as; set by the backward pass that took the streams.
    """

    def __init__(
        self,
        arithmetic: Arithmetic,
        streams: Sequence[Tensor],
        gradients: Sequence[Tensor] | None = None,
        device: torch.device | None = None,
        invalid: Tensor | None = None,
        again: Callable[[Tensor], Sequence[Tensor]] | None = None,
    ) -> None:
        """Make a source.

        Args:
            arithmetic: of the streams.
            streams: (batch, length, dim) each.
            gradients: fp32 of the streams' shape, to which the gradients are added; None: zeros are made when needed,
                where the streams are.
            device: that computes; None: that of the streams.
            invalid: scalar, added to all that is read: NaN if the streams left their range.
            again: makes the streams from `start`: for a second backward pass, after the first has taken them.
        """
        self.arithmetic = arithmetic
        batch, length, dim = streams[0].shape
        self.shape = torch.Size((batch, length, dim * len(streams)))
        self.dtype = torch.promote_types(streams[0].dtype, torch.float32)
        self.device = streams[0].device if device is None else device
        self.start: Tensor | None = None
        self._streams: Sequence[Tensor] | None = streams
        self._gradients = gradients
        self._given = gradients is not None
        self._invalid = invalid
        self._again = again

    @property
    def streams(self) -> Sequence[Tensor]:
        """The streams. If they were taken, they are made again: a second backward pass through one graph."""
        if self._streams is None:
            assert self._again is not None and self.start is not None
            self._streams, self.start = self._again(self.start), None
        return self._streams

    def take(self) -> tuple[list[Tensor], list[Tensor]]:
        """The streams and their gradients, which the caller may overwrite: this object then holds neither."""
        streams, gradients = list(self.streams), list(self.gradients())
        self._streams = self._gradients = None
        return streams, gradients

    def begin(self) -> None:
        """Begin a backward pass: drop the gradients of an earlier one, which ended before the stack took them.

        A pass for the weights of the last norm alone does so. The source of both streams of a stack has one reader,
        which calls this first.
        """
        if not self._given:
            self._gradients = None

    def gradients(self) -> Sequence[Tensor]:
        """The gradients so far."""
        if self._gradients is None:
            self._gradients = [
                torch.zeros(
                    stream.shape, dtype=self.dtype, device=stream.device, pin_memory=stream.is_pinned()
                )
                for stream in self.streams
            ]
        return self._gradients

    def rows(self, part: slice) -> tuple[Tensor, float]:
        """What some of the batch · length positions hold: numbers (positions, width), and the value of 1 in them."""
        each = [stream.flatten(0, 1)[part].to(self.device, non_blocking=True) for stream in self.streams]
        if len(each) == 1 and self._invalid is None:
            return each[0], self.arithmetic.UNIT
        rows = torch.cat([self.arithmetic.decode(one) for one in each], dim=-1)
        return rows if self._invalid is None else rows.add_(self._invalid), 1.0

    def add_gradients(self, part: slice, gradients: Tensor) -> None:
        """Add the gradients (positions, width) of `rows(part)`."""
        sums = self.gradients()
        for total, gradient in zip(sums, gradients.chunk(len(sums), dim=-1), strict=True):
            for here, new in on_device(total.view(-1, total.shape[-1])[part], gradient):
                here += new


class Rows:
    """The rows of a tensor, or of a source, read a piece at a time; and their gradients.

    Args:
        x: (..., width), where there is no source.
        source: read instead of x.
    """

    def __init__(self, x: Tensor | None, source: Source | None) -> None:
        self._source = source
        self._x: Tensor | None = None
        self._grad: Tensor | None = None
        if source is None:
            assert x is not None
            self.shape, self.dtype = x.shape, torch.promote_types(x.dtype, torch.float32)
            self._x = x.reshape(-1, x.shape[-1])
        else:
            self.shape, self.dtype = source.shape, source.dtype

    def parts(self, rows: int) -> Iterator[slice]:
        """All rows, in pieces of so many."""
        return slices(math.prod(self.shape[:-1]), rows)

    def numbers(self, part: slice) -> tuple[Tensor, float]:
        """Some rows (n, width), and the value of 1 in them."""
        if self._source is not None:
            return self._source.rows(part)
        assert self._x is not None
        return self._x[part], 1.0

    def floats(self, part: slice) -> Tensor:
        """Some rows (n, width) in floating point."""
        return scaled(*self.numbers(part))

    def add_gradients(self, part: slice, gradients: Tensor) -> None:
        """Take the gradients (n, width) of some rows; once for each row."""
        if self._source is not None:
            self._source.add_gradients(part, gradients)
            return
        assert self._x is not None
        if self._grad is None:
            self._grad = torch.empty_like(self._x)
        self._grad[part] = gradients

    def gradient(self, device: torch.device) -> Tensor:
        """What autograd is given for x: the gradients of all rows, or that of a source's link."""
        if self._x is None:
            return torch.zeros((), dtype=torch.float32, device=device)
        return (torch.empty_like(self._x) if self._grad is None else self._grad).view(self.shape)


def scaled(x: Tensor, unit: float) -> Tensor:
    """unit · x, in floating point."""
    if unit == 1.0:
        return x
    return x.to(torch.promote_types(x.dtype, torch.float32)).mul_(unit)


def decoded(x: Tensor, source: Source | None) -> Tensor:
    """A copy of all that a source holds, (batch, length, width) in floating point, with x as its link; x itself if
    there is no source."""
    return x if source is None else _Decoded.apply(x, source)


class _Decoded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, link: Tensor, source: Source) -> Tensor:
        ctx.source = source
        rows, _ = source.rows(slice(None))
        return (rows if len(source.streams) > 1 else source.arithmetic.decode(rows)).view(source.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ctx.source.begin()
        ctx.source.add_gradients(slice(None), grads[0].reshape(-1, grads[0].shape[-1]))
        return torch.zeros((), device=grads[0].device), None
