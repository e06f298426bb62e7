"""What a device is good at: the size of work that suits it, and the products it has units for."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import torch

CACHED = 1 << 16
"""Numbers of a piece of work on a CPU: a few of them, and what is made of them, fit a core's cache."""


def pieces(length: int, width: int, device: torch.device) -> Iterator[slice]:
    """Slices of `length` things of `width` numbers each, for work that passes over them several times: on a CPU of a
    size that stays in cache; on a GPU, which wants all at once, the whole."""
    step = max(1, CACHED // width) if device.type == "cpu" else max(1, length)
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


@functools.cache
def has_half_products(device_type: str, dtype: torch.dtype) -> bool:
    """Whether the device multiplies matrices of bf16 or fp16 in hardware. Only of CPUs some do not."""
    if device_type != "cpu":
        return True
    wanted = {
        torch.bfloat16: {"avx512_bf16", "amx_bf16", "bf16"},
        torch.float16: {"avx512_fp16", "amx_fp16", "fphp"},
    }
    lines = processor_lines("flags", "features")
    return not lines or bool(wanted[dtype] & set(lines[0].split()))


def processor_lines(*names: str) -> list[str]:
    """The lines of /proc/cpuinfo that begin with one of these lower-case names, for every core; none where there is no
    such file."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
    return [line for line in lines if line.lower().startswith(names)]
