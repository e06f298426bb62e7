"""How large the blocks of each kernel are, and how many warps work on one."""

from __future__ import annotations

from typing import NamedTuple


class Tiles(NamedTuple):
    """The sizes of a kernel.

    Attributes:
        own: Slots (in the hash: positions) that a program computes.
        other: Slots on the other side of the pairs that it loads at a time.
        warps: Warps of a program.
        stages: Stages of the software pipeline.
        registers: Limit on the registers of a thread; None leaves it to the compiler.
    """

    own: int
    other: int
    warps: int
    stages: int
    registers: int | None = None


FORWARD = {
    16: Tiles(64, 32, 4, 1, 128),
    32: Tiles(64, 32, 4, 1, 128),
    64: Tiles(64, 32, 4, 1, 128),
    128: Tiles(64, 32, 4, 1, 168),
}
BACKWARD = {
    16: Tiles(64, 32, 4, 1, 168),
    32: Tiles(64, 32, 4, 1, 168),
    64: Tiles(64, 32, 4, 1, 168),
    128: Tiles(32, 32, 2, 2),
}
"""By the padded width of q, k and v, for operands of 16 bits.

Measured on an H100 (benchmarks/gpu_tiles.py, docs/kernels.md). Both passes wait for the rows that they gather, so the
number of programs that take turns on a multiprocessor decides. Loading 32 slots at a time and limiting registers makes
room for more programs. Larger blocks would compute more pairs that do not count: a block loads the keys of its own
slots and of `reach` more.
"""

SINGLE = {16: Tiles(32, 32, 4, 1), 32: Tiles(32, 32, 4, 1), 64: Tiles(32, 32, 4, 1), 128: Tiles(32, 32, 8, 1)}
"""For operands of fp32, forward and backward."""

HASH = Tiles(128, 0, 4, 1)

INTEGERS = (
    *("least", "positions_row", "positions_round", "buckets_row", "buckets_round"),
    *("length", "reach", "number", "rounds", "steps"),
)
"""Arguments of kernels whose values are not compiled in: a new length or reach needs no new code."""
