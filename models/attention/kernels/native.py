"""cpp/, built once for this machine and called through ctypes: the kernels of a CPU.

The source is compiled when attention first runs on a CPU, by the C++ compiler that $CXX names, else g++ or clang++,
in some seconds, into $MEGABASE_CACHE (default: ~/.cache/megabase). The file's name is a hash of source, compiler,
flags and processor, so one home directory serves a cluster of different machines, and nothing stale is ever loaded.
Where that folder cannot be written, every process builds its own.
The library has a plain C interface: it needs neither torch's headers nor Python's, and any version of either
may load it. Without a compiler a warning says so, once, and `chunked` takes over.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megabase.models.attention.kernels.inputs import PairDropout, Rotations, Rule, SortedOrder
from megabase.models.device import processor_lines

SOURCE = Path(__file__).with_name("cpp") / "attention.cpp"
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-pthread")
BUILD_SECONDS = 300
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

HIDDEN = -1e30
"""What a running maximum of scores starts from, as in cpp/strip.h."""


def available() -> bool:
    """Whether the library is there, or could be built."""
    return _library() is not None


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

    Computes in fp32. The same input gives the same bits, whatever the number of threads.
    """
    return _SortedAttention.apply(q, k, v, order, rule, dropout, scale)


def rotate_and_hash(x: Tensor, rotations: Rotations) -> Tensor:
    """dispatch.rotate_and_hash. A position's buckets do not depend on what else is hashed with it."""
    x = _dense(x.detach())
    batch, heads, length = x.shape[:3]
    halves = rotations.halves
    # (rounds, factors, heads, half, d), end to end: factors differ in size.
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
    """SortedOrder.by_bucket of buckets (rows, rounds, length) in [0, n_buckets), by counting."""
    buckets = buckets.to(torch.int32).contiguous()
    rows, rounds, length = buckets.shape
    hidden = None if mask is None else (~mask).to(torch.int32).contiguous()
    order, seated = torch.empty_like(buckets), torch.empty_like(buckets)
    sorting = _Sorting(
        buckets=buckets.data_ptr(),
        hidden=None if hidden is None else hidden.data_ptr(),
        order=order.data_ptr(),
        seated=seated.data_ptr(),
        rows=rows,
        rounds=rounds,
        length=length,
        n_buckets=n_buckets,
        threads=torch.get_num_threads(),
    )
    _call("megabase_sort", sorting)
    return SortedOrder(order, seated, SortedOrder.count_real(mask, buckets))


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
        out = _like(v)
        lse = torch.full((q.shape[0] * q.shape[1], q.shape[2]), HIDDEN)
        problem, kept = _problem(q, k, v, out, lse, torch.zeros_like(lse), order, rule, dropout, scale)
        _call("megabase_forward", problem)
        del kept
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.case = order, rule, dropout, scale
        return out.to(v.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        grad = _dense(grads[0] if grads[0].dtype in DTYPES else grads[0].float())
        dq, dk, dv = _like(q), _like(q), _like(v)
        problem, kept = _problem(q, k, v, out, lse, torch.empty_like(lse), *ctx.case)
        problem.grad, problem.dq, problem.dk, problem.dv = map(_Tensor.of, (grad, dq, dk, dv))
        _call("megabase_backward", problem)
        del kept
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
    def of(cls, x: Tensor) -> _Tensor:
        return cls(x.data_ptr(), DTYPES[x.dtype], x.shape[-1], *x.stride()[:3])


class _Problem(ctypes.Structure):
    """`Problem` of cpp/strip.h."""

    _fields_ = (
        *((name, _Tensor) for name in ("q", "k", "v", "out", "grad", "dq", "dk", "dv")),
        *((name, ctypes.c_void_p) for name in ("most", "total", "order", "rank", "buckets")),
        *((name, ctypes.c_int64) for name in ("order_row", "rank_row", "buckets_row")),
        ("real", ctypes.c_void_p),
        ("keys", ctypes.c_void_p),
        ("rate", ctypes.c_double),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("batch", "heads", "rounds", "length", "reach")),
        *((name, ctypes.c_int32) for name in ("window", "causal", "once", "shared", "threads")),
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
        *((name, ctypes.c_void_p) for name in ("buckets", "hidden", "order", "seated")),
        *((name, ctypes.c_int32) for name in ("rows", "rounds", "length", "n_buckets", "threads")),
    )


def _problem(
    q: Tensor,
    k: Tensor | None,
    v: Tensor,
    out: Tensor,
    most: Tensor,
    total: Tensor,
    order: SortedOrder,
    rule: Rule,
    dropout: PairDropout | None,
    scale: float,
) -> tuple[_Problem, list[Tensor]]:
    """What forward and backward share, and the tensors that must live while it is used. most, total: (rows, length),
    as cpp/strip.h has them."""
    batch, heads, length, _ = q.shape
    positions, buckets = _table(order.positions), _table(order.buckets)
    slots = _table(order.slots) if rule.once else positions
    real = order.real_lengths.to(torch.int32).contiguous()
    problem = _Problem(
        q=_Tensor.of(q),
        k=_Tensor() if k is None else _Tensor.of(k),
        v=_Tensor.of(v),
        out=_Tensor.of(out),
        most=most.data_ptr(),
        total=total.data_ptr(),
        order=positions.data_ptr(),
        rank=slots.data_ptr(),
        buckets=buckets.data_ptr(),
        order_row=positions.stride(0),
        rank_row=slots.stride(0),
        buckets_row=buckets.stride(0),
        real=real.data_ptr(),
        scale=scale,
        batch=batch,
        heads=heads,
        rounds=positions.shape[1],
        length=length,
        reach=min(rule.reach, length),  # what is longer changes nothing, and needs memory
        window=rule.attend == "window",
        causal=rule.causal,
        once=rule.once,
        shared=rule.shared,
        threads=torch.get_num_threads(),
    )
    kept = [total, positions, slots, buckets, real]
    if dropout is not None:
        keys = dropout.keys.contiguous()
        problem.keys, problem.rate = keys.data_ptr(), dropout.rate
        kept.append(keys)
    return problem, kept


def _table(seats: Tensor) -> Tensor:
    """(rows, rounds, length) int32; rows may be one and the same, rounds and length are dense."""
    seats = seats.to(torch.int32)
    dense = seats.stride(2) == 1 and (seats.shape[1] == 1 or seats.stride(1) == seats.shape[2])
    return seats if dense else seats.contiguous()


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _like(x: Tensor) -> Tensor:
    """fp32 zeros of x's shape (batch, heads, length, d), heads side by side: what merges heads copies nothing."""
    batch, heads, length, d = x.shape
    return torch.zeros(batch, length, heads, d).transpose(1, 2)


def _call(name: str, argument: ctypes.Structure) -> None:
    library = _library()
    assert library is not None
    getattr(library, name)(ctypes.byref(argument))  # lets go of the interpreter's lock meanwhile


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The library, built if it is not there; None, and a warning, where that is impossible."""
    compiler = _compiler()
    try:
        if compiler is None:
            raise FileNotFoundError("there is no C++ compiler (looked for $CXX, else g++ and clang++)")
        library = ctypes.CDLL(str(_build(compiler)))
        library.megabase_use_threads(_torch_threads())
        return library
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines()
        reason = f"{compiler} failed: " + next(
            (line for line in lines if "error" in line), " ".join(lines[-1:])
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = str(error)
    warnings.warn(
        f"attention on the CPU runs several times slower than it could: {reason}. "
        "Install g++, or set CXX to a C++17 compiler.",
        stacklevel=2,
    )
    return None


def _torch_threads() -> ctypes.c_void_p | None:
    """Address of GOMP_parallel in the OpenMP library of this process (GNU's; LLVM's and Intel's have it too)."""
    try:
        loaded = re.findall(r"/\S*/lib[gi]?omp[^/\s]*\.so\S*", Path("/proc/self/maps").read_text())
        return ctypes.cast(ctypes.CDLL(loaded[0]).GOMP_parallel, ctypes.c_void_p)
    except (OSError, IndexError, AttributeError):
        return None


def _compiler() -> str | None:
    named = os.environ.get("CXX")
    return shutil.which(named) if named else shutil.which("g++") or shutil.which("clang++")


def _build(compiler: str) -> Path:
    """Path of the library for this machine. Published by rename: several processes may build it at once."""
    tuned = "-march=native" if platform.machine() in ("x86_64", "AMD64") else "-mcpu=native"
    command = [compiler, *FLAGS, tuned]
    sources = (path.read_text() for path in sorted(SOURCE.parent.iterdir()))
    # What the compiler's `native` depends on.
    processor = sorted(set(processor_lines("model name", "flags", "features", "cpu part"))) or [
        platform.processor()
    ]
    identity = (*sources, *command, _run([compiler, "--version"]), *processor)
    name = hashlib.sha256("\0".join(identity).encode()).hexdigest()[:20]
    library = _cache() / f"attention-{name}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
            made = Path(scratch) / library.name
            _run([*command, str(SOURCE), "-o", str(made)])
            made.replace(library)
    return library


def _run(command: Sequence[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=BUILD_SECONDS, check=True).stdout


def _cache() -> Path:
    """Where libraries are kept; where that cannot be written, a folder that goes with this process."""
    named = os.environ.get("MEGABASE_CACHE")
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(named) if named else Path(home) / "megabase"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        private = tempfile.mkdtemp(prefix="megabase-")
        atexit.register(shutil.rmtree, private, ignore_errors=True)
        return Path(private)
