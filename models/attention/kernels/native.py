"""The CPU kernel: the C++ in cpp/, called through ctypes.

The source is compiled when attention first runs on a CPU (`native_library`). The library has a plain C interface: it
needs neither torch's headers nor Python's, and any version of either may load it. Without a compiler a warning is
given once, and `chunked` runs instead.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from megabase.models.attention.kernels.inputs import PairDropout, Rotations, Rule, SortedOrder
from megabase.models.attention.kernels.native_library import load_library

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

STRIP, BLOCK = 240, 24
"""Slots of a row that are computed together, and a divisor of their number, as in cpp/problem.h."""

EXCLUDED = -1e30
"""What a running maximum of scores starts from, as in cpp/problem.h."""


def available() -> bool:
    """Whether the library exists or could be built."""
    return load_library() is not None


def supports(q: Tensor, v: Tensor) -> bool:
    """Whether `sorted_attention` computes with such tensors."""
    return q.device.type == "cpu" and q.dtype in DTYPES and v.dtype in DTYPES and available()


def sorted_attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor,
    order: SortedOrder,
    rule: Rule,
    dropout: PairDropout | None = None,
    scale: float = 1.0,
) -> Tensor:
    """The same as `dispatch.sorted_attention`, for q, k, v in fp32, bf16 or fp16 on the CPU, with any strides.

    Computes in fp32. The same input gives the same bits, whatever the number of threads. If q has fewer positions than
    k, it has no gradient.
    """
    return _SortedAttention.apply(q, k, v, order, rule, dropout, scale)


def rotate_and_hash(x: Tensor, rotations: Rotations) -> Tensor:
    """The same as `reference.rotate_and_hash`, up to rounding, for fp32, bf16 or fp16 on the CPU.

    A position's buckets do not depend on the other positions that are hashed in the same call.
    """
    x = _dense(x.detach())
    batch, heads, length = x.shape[:3]
    halves = rotations.halves
    # (rounds, factors, heads, half, d), one after the other: factors differ in size.
    each = (factor for number in range(rotations.rounds) for factor in rotations.factors(number))
    flat = torch.cat([factor.mT.flatten() for factor in each])
    sizes = torch.tensor(halves, dtype=torch.int32)
    buckets = torch.empty(batch, heads, rotations.rounds, length, dtype=torch.int32)
    hashing = _Hashing(
        x=_Tensor.of(x),
        rotations=flat.data_ptr(),
        halves=sizes.data_ptr(),
        buckets=buckets.data_ptr(),
        factors=len(halves),
        batch=batch,
        heads=heads,
        rounds=rotations.rounds,
        length=length,
        threads=torch.get_num_threads(),
    )
    _call("megabase_hash", hashing)
    return buckets


def sort_by_bucket(buckets: Tensor, n_buckets: int, mask: Tensor | None) -> SortedOrder:
    """The same as `SortedOrder.by_bucket`, for buckets (rows, rounds, length) in [0, n_buckets), by counting sort."""
    buckets = buckets.to(torch.int32).contiguous()
    rows, rounds, length = buckets.shape
    padding = None if mask is None else (~mask).to(torch.int32).contiguous()
    positions, sorted_buckets = torch.empty_like(buckets), torch.empty_like(buckets)
    sorting = _Sorting(
        buckets=buckets.data_ptr(),
        padding=None if padding is None else padding.data_ptr(),
        positions=positions.data_ptr(),
        sorted_buckets=sorted_buckets.data_ptr(),
        rows=rows,
        rounds=rounds,
        length=length,
        n_buckets=n_buckets,
        threads=torch.get_num_threads(),
    )
    _call("megabase_sort", sorting)
    return SortedOrder(positions, sorted_buckets, SortedOrder.count_real(mask, buckets))


class _SortedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor | None,
        v: Tensor,
        order: SortedOrder,
        rule: Rule,
        dropout: PairDropout | None,
        scale: float,
    ) -> Tensor:
        q, k, v = _dense(q), None if k is None else _dense(k), _dense(v)
        out = _like(v[:, :, v.shape[2] - q.shape[2] :])
        lse = torch.full((v.shape[0] * v.shape[1], v.shape[2]), EXCLUDED)
        problem, in_use = _problem(q, k, v, out, lse, torch.zeros_like(lse), order, rule, dropout, scale)
        _call("megabase_forward", problem)
        del in_use
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.case = order, rule, dropout, scale
        return out.to(v.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        assert q.shape[2] == v.shape[2], "no gradient for a part of the queries"
        grad = _dense(grads[0] if grads[0].dtype in DTYPES else grads[0].float())
        dq, dk, dv = _like(q), _like(q), _like(v)
        problem, in_use = _problem(q, k, v, out, lse, torch.empty_like(lse), *ctx.case)
        problem.grad, problem.dq, problem.dk, problem.dv = map(_Tensor.of, (grad, dq, dk, dv))
        _call("megabase_backward", problem)
        del in_use
        return dq.to(q.dtype), None if k is None else dk.to(k.dtype), dv.to(v.dtype), None, None, None, None


class _Tensor(ctypes.Structure):
    """`Tensor` of cpp/tensors.h: (batch, heads, length, width) with a dense last axis, strides in elements."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_int32),
        ("width", ctypes.c_int32),
        ("batch", ctypes.c_int64),
        ("head", ctypes.c_int64),
        ("place", ctypes.c_int64),
    )

    @classmethod
    def of(cls, x: Tensor, first: int = 0) -> _Tensor:
        """The memory of x, whose positions have the numbers from `first` on."""
        start = x.data_ptr() - first * x.stride(2) * x.element_size()
        return cls(start, DTYPES[x.dtype], x.shape[-1], *x.stride()[:3])


class _Problem(ctypes.Structure):
    """`Problem` of cpp/problem.h."""

    _fields_ = (
        *((name, _Tensor) for name in ("q", "k", "v", "out", "grad", "dq", "dk", "dv")),
        *((name, ctypes.c_void_p) for name in ("peak", "total", "positions", "slots", "buckets")),
        *((name, ctypes.c_int64) for name in ("positions_row", "slots_row", "buckets_row")),
        ("real_lengths", ctypes.c_void_p),
        ("dropout_keys", ctypes.c_void_p),
        ("rate", ctypes.c_double),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("batch", "heads", "rounds", "length", "reach")),
        *(
            (name, ctypes.c_int32)
            for name in ("window", "causal", "once", "excludes_own", "own_if_alone", "threads", "first_query")
        ),
    )


class _Hashing(ctypes.Structure):
    """`Hashing` of cpp/hashing.h."""

    _fields_ = (
        ("x", _Tensor),
        *((name, ctypes.c_void_p) for name in ("rotations", "halves", "buckets")),
        *((name, ctypes.c_int32) for name in ("factors", "batch", "heads", "rounds", "length", "threads")),
    )


class _Sorting(ctypes.Structure):
    """`Sorting` of cpp/hashing.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("buckets", "padding", "positions", "sorted_buckets")),
        *((name, ctypes.c_int32) for name in ("rows", "rounds", "length", "n_buckets", "threads")),
    )


def _problem(
    q: Tensor,
    k: Tensor | None,
    v: Tensor,
    out: Tensor,
    peak: Tensor,
    total: Tensor,
    order: SortedOrder,
    rule: Rule,
    dropout: PairDropout | None,
    scale: float,
) -> tuple[_Problem, list[Tensor]]:
    """The arguments that forward and backward share, and the tensors that must stay alive while they are used.

    peak, total: (rows, length), see `Problem` in cpp/problem.h.
    """
    batch, heads, length, _ = v.shape
    first = length - q.shape[2]
    positions, buckets = _table(order.positions), _table(order.buckets)
    slots = _table(order.slots) if rule.once else positions
    real_lengths = order.real_lengths.to(torch.int32).contiguous()
    problem = _Problem(
        q=_Tensor.of(q, first),
        k=_Tensor() if k is None else _Tensor.of(k),
        v=_Tensor.of(v),
        out=_Tensor.of(out, first),
        peak=peak.data_ptr(),
        total=total.data_ptr(),
        positions=positions.data_ptr(),
        slots=slots.data_ptr(),
        buckets=buckets.data_ptr(),
        positions_row=positions.stride(0),
        slots_row=slots.stride(0),
        buckets_row=buckets.stride(0),
        real_lengths=real_lengths.data_ptr(),
        scale=scale,
        batch=batch,
        heads=heads,
        rounds=positions.shape[1],
        length=length,
        reach=min(rule.reach, length),  # a longer reach changes nothing, and needs memory
        window=rule.attend == "window",
        causal=rule.causal,
        once=rule.once,
        excludes_own=rule.excludes_own,
        own_if_alone=rule.own == "alone",
        threads=torch.get_num_threads(),
        first_query=first,
    )
    in_use = [total, positions, slots, buckets, real_lengths]
    if dropout is not None:
        keys = dropout.keys.contiguous()
        problem.dropout_keys, problem.rate = keys.data_ptr(), dropout.rate
        in_use.append(keys)
    return problem, in_use


def _table(numbers: Tensor) -> Tensor:
    """(rows, rounds, length) as int32, with dense rounds and lengths; all rows may share their memory."""
    numbers = numbers.to(torch.int32)
    dense = numbers.stride(2) == 1 and (numbers.shape[1] == 1 or numbers.stride(1) == numbers.shape[2])
    return numbers if dense else numbers.contiguous()


def _dense(x: Tensor) -> Tensor:
    """x, or a copy, whose last axis is dense."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _like(x: Tensor) -> Tensor:
    """fp32 zeros of x's shape (batch, heads, length, d), stored as (batch, length, heads, d), as merged heads are."""
    batch, heads, length, d = x.shape
    return torch.zeros(batch, length, heads, d).transpose(1, 2)


def _call(name: str, argument: ctypes.Structure) -> None:
    """Call a function of the library; ctypes releases the interpreter's lock meanwhile."""
    library = load_library()
    assert library is not None
    getattr(library, name)(ctypes.byref(argument))
