"""Which kernel runs: the one place that decides, by device, dtype and size.

Callers ask for attention; what computes it is none of their business. All kernels give the same result, up to the
rounding of the dtype they compute in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megabase.models.attention.kernels import (
    PairDropout,
    Rotations,
    Rule,
    Seating,
    chunked,
    native,
    reference,
    row_mask,
    triton,
)
from megabase.models.config import ConfigError

BACKENDS = ("auto", "reference", "chunked", "native", "triton")
ANYWHERE = ("reference", "chunked")


@dataclass(frozen=True)
class Choice:
    """A kernel that is not made of torch's operations. takes: whether it can compute with queries and values (batch,
    heads, length, d). It is the fastest on `device`, at lengths from `least` on."""

    backend: str
    takes: Callable[[Tensor, Tensor], bool]
    device: str
    least: int = 1

    def fits(self, q: Tensor, v: Tensor) -> bool:
        """Whether `auto` chooses it."""
        return q.device.type == self.device and q.shape[2] >= self.least and self.takes(q, v)


CHOICES = (Choice("triton", triton.takes, "cuda"), Choice("native", native.takes, "cpu"))
"""`auto` is the first that fits, else `chunked`. Measured, see docs/kernels.md."""


def choose(q: Tensor, v: Tensor, backend: str = "auto") -> str:
    """The kernel for queries and values (batch, heads, length, d). Raises ConfigError if it cannot run here."""
    if backend == "auto":
        return next((choice.backend for choice in CHOICES if choice.fits(q, v)), "chunked")
    if backend in ANYWHERE or any(choice.backend == backend and choice.takes(q, v) for choice in CHOICES):
        return backend
    raise ConfigError(
        f"backend={backend!r} cannot run here, with {q.dtype} of width {q.shape[-1]} on {q.device.type}: "
        "choose auto or chunked"
    )


def meet(
    q: Tensor,
    k: Tensor | None,
    v: Tensor,
    seating: Seating,
    rule: Rule,
    dropout: PairDropout | None = None,
    *,
    scale: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """Attention of every position over the keys it meets by `rule`.

    q, k, v: (batch, heads, length, d), v's d may differ; seating: of batch × heads rows. A score is scale · q · k.
    k = None: queries are keys, scaled to unit length (`unit_keys`), and a score is q · unit(q).
    Returns (batch, heads, length, d_v) in v's dtype.
    """
    chosen = choose(q, v, backend)
    if chosen == "native":
        return native.meet(q, k, v, seating, rule, dropout, scale)
    rows, values = q.flatten(0, 1), v.flatten(0, 1)
    keys = None if k is None else (k * scale).flatten(0, 1)
    if chosen == "triton":
        out = triton.meet(rows, keys, values, seating, rule, dropout)
    else:
        kernel = reference.meet if chosen == "reference" else chunked.meet
        out = kernel(rows, unit_keys(rows) if keys is None else keys, values, seating, rule, dropout)
    return out.unflatten(0, v.shape[:2])


def rotate_and_hash(x: Tensor, rotations: Rotations) -> Tensor:
    """models.attention.lsh.hash_buckets once the rotations are drawn: x (batch, heads, length, d) to int32 (batch,
    heads, rounds, length)."""
    x = x.detach() if x.dtype in native.DTYPES else x.detach().float()
    if x.is_cuda and triton.available():
        return triton.rotate_and_hash(x, rotations)
    if x.device.type == "cpu" and native.available():
        return native.hash_buckets(x, rotations)
    return reference.rotate_and_hash(x, rotations)


def seat_by_hash(x: Tensor, rotations: Rotations, mask: Tensor | None) -> Seating:
    """Seats of x (batch, heads, length, d) for rotations as drawn; mask: (batch, length) bool, True where real."""
    if x.is_cuda and triton.available():
        return triton.seat_by_hash(x, rotations, mask)
    buckets = rotate_and_hash(x, rotations)
    return seat(buckets.flatten(0, 1), rotations.n_buckets, row_mask(mask, x.shape[1]))


def seat(buckets: Tensor, n_buckets: int | None, mask: Tensor | None) -> Seating:
    """Seats for buckets (rows, rounds, length), integers from 0 on, below `n_buckets` if that is known; mask: (rows,
    length) bool, True where a position is real."""
    if buckets.device.type == "cpu" and n_buckets is not None and native.available():
        return native.seat(buckets, n_buckets, mask)
    return Seating.by_bucket(buckets, mask)


def unit_keys(qk: Tensor) -> Tensor:
    """Keys of query-keys (..., d): x · rsqrt(mean(x²) + 1e-6) / √d, a unit vector, in their dtype."""
    wide = qk.to(torch.promote_types(qk.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6) * qk.shape[-1] ** -0.5).to(
        qk.dtype
    )
