"""Which kernel runs: the one place that decides, by device, dtype and size.

All kernels give the same result, up to the rounding of the dtype they compute in, so callers need not know which ran.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from megabase.models.attention.kernels import chunked, native, reference
from megabase.models.attention.kernels.inputs import PairDropout, Rotations, Rule, SortedOrder, row_mask
from megabase.models.attention.kernels.triton import host as triton
from megabase.models.config import ConfigError

BACKENDS = ("auto", "reference", "chunked", "native", "triton", "triton-together")
PORTABLE = ("reference", "chunked")
"""Backends made of torch's operations: they run on every device, with every float dtype."""
TRITON: dict[str, Callable[..., Tensor]] = {
    "triton": triton.sorted_attention,
    "triton-together": partial(triton.sorted_attention, together=True),
}
"""The kernels for GPUs: one launch for each round, or all rounds in one launch."""
GPU_BACKEND = "MEGABASE_GPU_BACKEND"
"""Environment variable: the one of TRITON that `auto` chooses on a GPU."""
FAST: dict[str, Callable[[Tensor, Tensor], bool]] = {
    "native": native.supports,
    **dict.fromkeys(TRITON, triton.supports),
}
"""Kernels that are not made of torch's operations: whether they can compute with queries and values (batch, heads,
length, d)."""


def choose_backend(q: Tensor, v: Tensor, backend: str = "auto") -> str:
    """Name the kernel that computes with queries and values (batch, heads, length, d).

    Raises:
        ConfigError: The backend asked for cannot run with these tensors, or GPU_BACKEND has a wrong value.
    """
    if backend == "auto":
        # docs/kernels.md has the times.
        fastest = {"cpu": "native", "cuda": gpu_backend()}.get(q.device.type)
        return fastest if fastest and FAST[fastest](q, v) else "chunked"
    if backend in PORTABLE or (backend in FAST and FAST[backend](q, v)):
        return backend
    raise ConfigError(
        f"backend={backend!r} cannot run here, with {q.dtype} of width {q.shape[-1]} on {q.device.type}: "
        "choose auto or chunked"
    )


def gpu_backend() -> str:
    """The backend that `auto` chooses on a GPU.

    Raises:
        ConfigError: The environment variable names no backend for GPUs.
    """
    name = os.environ.get(GPU_BACKEND, "triton")
    if name not in TRITON:
        raise ConfigError(f"{GPU_BACKEND}={name}: choose one of {', '.join(TRITON)}, or unset it")
    return name


def sorted_attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor,
    order: SortedOrder,
    rule: Rule,
    dropout: PairDropout | None = None,
    *,
    scale: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """softmax(scale · q · k) v, over the keys that `rule` gives to every query.

    Args:
        q: (batch, heads, n, d), the queries of the last n positions: of all if n = length. If n is less, nothing has a
            gradient.
        k: Keys (batch, heads, length, d). None: keys are the queries scaled to unit length (`unit_keys`), and `scale`
            is not used; n = length.
        v: (batch, heads, length, d_v).
        order: The sorted order of batch × heads rows.
        rule: Which keys a query attends to.
        dropout: Dropout of attention weights.
        scale: Factor of the scores.
        backend: One of BACKENDS.

    Returns:
        (batch, heads, n, d_v) in v's dtype.

    Raises:
        ConfigError: The backend asked for cannot run with these tensors.
    """
    chosen = choose_backend(q, v, backend)
    if chosen == "native":
        return native.sorted_attention(q, k, v, order, rule, dropout, scale)
    first = v.shape[2] - q.shape[2]
    q = F.pad(q, (0, 0, first, 0)) if first else q
    rows, values = q.flatten(0, 1), v.flatten(0, 1)
    keys = None if k is None else (k * scale).flatten(0, 1)
    if chosen in TRITON:
        out = TRITON[chosen](rows, keys, values, order, rule, dropout)
    else:
        kernel = reference.sorted_attention if chosen == "reference" else chunked.sorted_attention
        out = kernel(rows, unit_keys(rows) if keys is None else keys, values, order, rule, dropout)
    return out.unflatten(0, v.shape[:2])[:, :, first:]


def rotate_and_hash(x: Tensor, rotations: Rotations) -> Tensor:
    """Hash x (batch, heads, length, d) with given rotations: buckets (batch, heads, rounds, length), int32."""
    x = x.detach() if x.dtype in native.DTYPES else x.detach().float()
    if x.is_cuda and triton.available():
        return triton.rotate_and_hash(x, rotations)
    if x.device.type == "cpu" and native.available():
        return native.rotate_and_hash(x, rotations)
    return reference.rotate_and_hash(x, rotations)


def sort_by_hash(
    x: Tensor, rotations: Rotations, mask: Tensor | None, *, backend: str = "auto"
) -> SortedOrder:
    """Hash x (batch, heads, length, d) with given rotations and sort, for `sorted_attention` of a backend with x.

    mask: (batch, length) bool, True where real.
    """
    if x.is_cuda and triton.available():
        together = (gpu_backend() if backend == "auto" else backend) == "triton-together"
        return triton.sort_by_hash(x, rotations, mask, together=together)
    buckets = rotate_and_hash(x, rotations)
    return sort_by_bucket(buckets.flatten(0, 1), rotations.n_buckets, row_mask(mask, x.shape[1]))


def sort_by_bucket(buckets: Tensor, n_buckets: int | None, mask: Tensor | None) -> SortedOrder:
    """Sort buckets (rows, rounds, length).

    Args:
        buckets: Integers from 0 on.
        n_buckets: They are below this number; None if it is not known.
        mask: (rows, length) bool, True where a position is real; None if all are.
    """
    if buckets.device.type == "cpu" and n_buckets is not None and native.available():
        return native.sort_by_bucket(buckets, n_buckets, mask)
    return SortedOrder.by_bucket(buckets, mask)


def piece_of(device: torch.device, reach: int) -> int:
    """Positions that a kernel computes together, counted from the first one; at least `reach`.

    If the sequence begins a multiple of this later, and at least one piece before a position, the position is computed
    as before, bit for bit.

    Args:
        device: of the tensors.
        reach: how many positions before and after it a position attends to.
    """
    least, multiple = (native.STRIP, native.BLOCK) if device.type == "cpu" else (128, 128)
    return max(least, -(-reach // multiple) * multiple)


def unit_keys(qk: Tensor) -> Tensor:
    """Keys of shared query-keys (..., d): x · rsqrt(mean(x²) + 1e-6) / √d, unit vectors, in their dtype."""
    wide = qk.to(torch.promote_types(qk.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6) * qk.shape[-1] ** -0.5).to(
        qk.dtype
    )
