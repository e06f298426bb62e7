"""Elementwise work of a block on a GPU, each in one pass over memory, in Triton.

`streams`, `norm`, `layers`, `positions` and `chance` call these functions if `supports(x)`, and otherwise compute the
same in plain torch. A function is imported when it is first used, and triton with it: a machine without a GPU never
imports triton.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from torch import Tensor

from megabase.models import gpu

if TYPE_CHECKING:
    from megabase.models.fused.chance import dropout, normals
    from megabase.models.fused.convolution import convolve
    from megabase.models.fused.norms import norm_gradients, normalised
    from megabase.models.fused.rotary import turn
    from megabase.models.fused.streams import add_to_stream, decode

__all__ = [
    "add_to_stream",
    "convolve",
    "decode",
    "dropout",
    "norm_gradients",
    "normalised",
    "normals",
    "supports",
    "turn",
]

WIDEST = 8192
"""Largest width of a norm: a row is held in registers."""

_MODULES = {
    "add_to_stream": "streams",
    "convolve": "convolution",
    "decode": "streams",
    "dropout": "chance",
    "norm_gradients": "norms",
    "normalised": "norms",
    "normals": "chance",
    "turn": "rotary",
}


def supports(x: Tensor) -> bool:
    """Whether these kernels compute with x: on a GPU, with triton, in one of the dtypes."""
    return x.is_cuda and gpu.available() and x.dtype in gpu.DTYPES


def __getattr__(name: str) -> Any:
    """Import an exported function when it is first used (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value
