"""Properties of a device that decide how work is done: the size of one piece, and matrix products in hardware."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import torch

CACHED = 1 << 16
"""Numbers in one piece of work on a CPU: a few pieces, with their intermediate results, fit into a core's cache."""


def pieces(length: int, width: int, device: torch.device) -> Iterator[slice]:
    """Cut items into slices, for work that passes over the same numbers several times.

    Args:
        length: Items.
        width: Numbers in an item.
        device: On a CPU a slice is small enough to stay in cache. On a GPU there is one slice: all items.

    Returns:
        Slices that cover range(length), in order.
    """
    step = max(1, CACHED // width) if device.type == "cpu" else max(1, length)
    return slices(length, step)


def slices(length: int, step: int) -> Iterator[slice]:
    """Slices of `step` items, the last of which may be shorter, that cover range(length) in order."""
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def devices_in_use() -> list[int]:
    """The GPU that this process computes on, if any: besides the CPU's, its generator may draw weights."""
    return [torch.cuda.current_device()] if torch.cuda.is_initialized() else []


@functools.cache
def has_half_products(device_type: str, dtype: torch.dtype) -> bool:
    """Whether the device multiplies matrices of bf16 or fp16 in hardware. All GPUs do; some CPUs do not."""
    if device_type != "cpu":
        return True
    wanted = {
        torch.bfloat16: {"avx512_bf16", "amx_bf16", "bf16"},
        torch.float16: {"avx512_fp16", "amx_fp16", "fphp"},
    }
    lines = processor_lines("flags", "features")
    return not lines or bool(wanted[dtype] & set(lines[0].split()))


def processor_lines(*names: str) -> list[str]:
    """The lines of /proc/cpuinfo that begin with one of these lower-case names, for every core.

    Empty if the file does not exist.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
    return [line for line in lines if line.lower().startswith(names)]
