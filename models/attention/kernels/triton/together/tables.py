"""What both passes look up by slot: made once for each call, in one launch, so that no program computes it again."""

# Device code has no Python types; host functions have all of theirs.
# mypy: allow-untyped-defs

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from megabase.models.attention.kernels.inputs import Rule, SortedOrder
from megabase.models.attention.kernels.triton.history import end_of_bucket, first_of_bucket
from megabase.models.attention.kernels.triton.memory import load_numbers
from megabase.models.attention.kernels.triton.tiles import INTEGERS
from megabase.models.gpu import FUSED

BLOCK = 512
"""Slots of a program."""


@dataclass(frozen=True)
class Tables:
    """Tables (rows, rounds, length) by slot.

    Attributes:
        positions: int32, the position in the slot.
        slot_low: int32, the first slot of the same bucket, at most `reach` before this one (rule `window`).
        slot_high: int32, one after the last slot of the same bucket, at most `reach` after this one (rule `window`).
        scales: fp32, the factor that makes a unit key of the position's query; None if keys are given.
    """

    positions: Tensor
    slot_low: Tensor
    slot_high: Tensor
    scales: Tensor | None

    @classmethod
    def of(cls, order: SortedOrder, rule: Rule, scales: Tensor | None) -> Tables:
        """The tables of an order. scales: (rows, length) fp32, by position."""
        rows, rounds, length = order.positions.shape
        positions, buckets = (
            x if x.stride(-1) == 1 else x.contiguous() for x in (order.positions, order.buckets)
        )
        window, reach = rule.attend == "window", min(rule.reach, length)
        made = torch.empty(
            3 if window else 1, rows, rounds, length, dtype=torch.int32, device=positions.device
        )
        slot_scales = None if scales is None else torch.empty(made.shape[1:], device=positions.device)
        tables = cls(made[0], made[-2 if window else 0], made[-1], slot_scales)
        fill_tables[(rows * rounds * triton.cdiv(length, BLOCK),)](
            *(positions, buckets, order.real_lengths, made if scales is None else scales),
            *(
                tables.positions,
                tables.slot_low,
                tables.slot_high,
                made if slot_scales is None else slot_scales,
            ),
            *(*positions.stride()[:2], *buckets.stride()[:2], length, reach, rounds, reach.bit_length()),
            **{"WINDOW": window, "UNIT": scales is not None, "BLOCK": BLOCK, **FUSED},
        )
        return tables

    def __getitem__(self, rows: slice) -> dict[str, Tensor]:
        """The kernels' arguments for some rows."""
        scales = self.slot_low if self.scales is None else self.scales
        return {
            "positions": self.positions[rows],
            "slot_low": self.slot_low[rows],
            "slot_high": self.slot_high[rows],
            "scales": scales[rows],
        }


@triton.jit(do_not_specialize=INTEGERS)
def fill_tables(
    sorted_positions, sorted_buckets, real_lengths, scales, positions, slot_low, slot_high, slot_scales,
    positions_row, positions_round, buckets_row, buckets_round, length, reach, rounds, steps,
    WINDOW: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The Tables of BLOCK slots of a round. steps: 2^steps > reach."""
    blocks = tl.cdiv(length, BLOCK)
    line = (tl.program_id(0) // blocks).to(tl.int64)
    row, number = line // rounds, line % rounds
    slot = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    valid = slot < length
    position = load_numbers(sorted_positions + row * positions_row + number * positions_round, slot, valid)
    place = line * length + slot
    tl.store(positions + place, position, mask=valid)
    if UNIT:
        scale = tl.load(scales + row * length + position, mask=valid, other=0.0)
        tl.store(slot_scales + place, scale, mask=valid)
    if WINDOW:
        buckets = sorted_buckets + row * buckets_row + number * buckets_round
        bucket = load_numbers(buckets, slot, valid)
        first = first_of_bucket(buckets, bucket, slot, valid, reach, steps)
        tl.store(slot_low + place, first, mask=valid)
        final = tl.load(real_lengths + row).to(tl.int32) - 1
        end = end_of_bucket(buckets, bucket, slot, valid, reach, final, steps)
        tl.store(slot_high + place, end, mask=valid)
