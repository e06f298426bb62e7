"""What the host needs to know about Triton: whether kernels can run, in which dtypes, with which options.

Importing this file does not import triton. Without a GPU the kernels run in Triton's interpreter, if TRITON_INTERPRET=1
was set when Python started: correct, and slow.
"""

from __future__ import annotations

import functools
import os

import torch

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""What the kernels compute with."""

FUSED = {"enable_fp_fusion": True}
"""Options of every launch: a · b + c is computed in one step, rounded once. It is the default up to Triton 3.9."""

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton's interpreter runs the kernels. Triton too decides this when it is imported."""


def available() -> bool:
    """Whether kernels can run here: compiled on a CUDA device, or interpreted."""
    return (INTERPRETED or torch.cuda.is_available()) and _has_triton()


@functools.cache
def _has_triton() -> bool:
    """Whether triton can be imported; torch for CPUs does not install it."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


def padded(width: int) -> int:
    """The side of a tile that holds `width`: a power of two, at least 16, as matrix products need."""
    return max(16, 1 << (width - 1).bit_length())
