"""Which kernel runs: the one place that decides, by device, dtype and size.

Callers ask for attention; what computes it is none of their business. All kernels give the same result, up to the
rounding of the dtype they compute in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from models.attention.kernels import PairDropout, Rule, Seating, chunked, native, reference
from models.config import ConfigError

BACKENDS = ("auto", "reference", "chunked", "native")
ANYWHERE = ("reference", "chunked")
HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Choice:
    """A kernel that is not made of torch's operations: where it runs, and from which length on it is the fastest."""

    backend: str
    available: Callable[[], bool]
    device: str
    dtypes: tuple[torch.dtype, ...]
    least: int = 1

    def runs(self, q: Tensor) -> bool:
        """Whether it can serve queries q (batch, heads, length, d)."""
        return q.device.type == self.device and q.dtype in self.dtypes and self.available()


CHOICES = (Choice("native", native.available, "cpu", (torch.float32, *HALF)),)
"""`auto` is the first that runs and is the fastest at this length; else `chunked`. Measured: docs/kernels.md."""


def choose(q: Tensor, backend: str = "auto") -> str:
    """The kernel for queries (batch, heads, length, d). Raises ConfigError if the one asked for cannot run."""
    able = [choice for choice in CHOICES if backend in ("auto", choice.backend) and choice.runs(q)]
    if backend == "auto":
        return next((choice.backend for choice in able if q.shape[2] >= choice.least), "chunked")
    if backend not in ANYWHERE and not able:
        raise ConfigError(
            f"backend={backend!r} cannot run here, with {q.dtype} on {q.device.type}: choose auto or chunked"
        )
    return backend


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
    chosen = choose(q, backend)
    if chosen == "native":
        return native.meet(q, k, v, seating, rule, dropout, scale)
    kernel = {"reference": reference.meet, "chunked": chunked.meet}[chosen]
    keys = unit_keys(q) if k is None else k * scale
    out = kernel(q.flatten(0, 1), keys.flatten(0, 1), v.flatten(0, 1), seating, rule, dropout)
    return out.view(v.shape)


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
