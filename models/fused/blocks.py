"""How work is divided among programs, and how all kernels of this package load numbers.

A step of a deep, narrow model is bound by the bytes it moves, and torch's operations move each number five to ten times
where once is enough (a rounding to fixed point takes five operations). Everything is computed in fp32 and rounded once.
Sums have one order: the same input gives the same bits.

Addresses have 64 bits. Values of the arguments that `do_not_specialize` names are not compiled in: a new length needs
no new code.
"""

# Device code has no Python types; host functions have all of theirs.
# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

from megabase.models.gpu import padded

BLOCK = 2048
"""Numbers that a program computes at a time."""

PROGRAMS = 1024
"""The most programs that sum the gradient of a weight. Each writes one row of partial sums."""


def block_of_rows(width: int) -> dict[str, int]:
    """Launch settings for rows of `width` numbers: how many a program holds at a time, and their padded width."""
    return {
        "PAD": padded(width),
        "ROWS": max(1, BLOCK // padded(width)),
        "num_warps": 4 if width <= 2048 else 8,
    }


def share(blocks: int) -> tuple[int, int]:
    """How many blocks each program computes, and how many programs there are: PROGRAMS at the most, 1 at least."""
    steps = max(1, triton.cdiv(blocks, PROGRAMS))
    return steps, max(1, triton.cdiv(blocks, steps))


@triton.jit
def load(x, at, valid):
    """Numbers of x in fp32; 0 where not valid."""
    return tl.load(x + at, mask=valid, other=0.0).to(tl.float32)
