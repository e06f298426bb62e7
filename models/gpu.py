"""What all Triton code shares: whether it can run here, and the random numbers of models/chance.py on the device.

Without a GPU, kernels run in Triton's interpreter (TRITON_INTERPRET=1 before triton is imported): right, and slow.
Without triton, which torch for CPUs does not bring along, they are plain functions that nobody calls.
"""

# What runs on the device has no types of Python.
# mypy: allow-untyped-defs

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""What the kernels compute with."""

FUSED = {"enable_fp_fusion": True}
"""a · b + c in one step: Triton up to 3.9 does so unasked."""


def jit(**options: Any) -> Callable[[Any], Any]:
    """triton.jit, or nothing where there is no triton."""
    return triton.jit(**options) if triton is not None else lambda function: function


@jit()
def random_bits(counter, low, high):
    """megabase.models.chance.random_bits, the key in two halves; all uint32."""
    bits = counter + low
    bits ^= bits >> 16
    bits *= 0x7FEB352D
    bits += high
    bits ^= bits >> 15
    bits *= 0x846CA68B
    bits ^= bits >> 16
    return bits


INTERPRETED = triton is not None and not isinstance(random_bits, triton.JITFunction)
"""Whether triton was imported with TRITON_INTERPRET=1."""


def available() -> bool:
    """Whether kernels can run here: compiled on a CUDA device, or interpreted."""
    return triton is not None and (INTERPRETED or torch.cuda.is_available())


def padded(width: int) -> int:
    """The side of a tile that holds `width`: a power of two, at least 16, which products of matrices want."""
    return max(16, triton.next_power_of_2(width))
