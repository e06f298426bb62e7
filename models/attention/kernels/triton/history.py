"""The tables of the rule `once`: at every position, its slot in each round and the slots that it attends to."""

# Device code has no Python types.
# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

from megabase.models.attention.kernels.triton.memory import load_numbers
from megabase.models.attention.kernels.triton.tiles import INTEGERS


@triton.jit
def first_of_bucket(buckets, bucket, slot, valid, reach, steps):
    """The first slot of the slots' `bucket`, at most `reach` before each. By bisection, with 2^steps > reach."""
    least, most = tl.maximum(slot - reach, 0), slot
    for _ in range(steps):
        middle = (least + most) // 2
        same = load_numbers(buckets, middle, valid) == bucket
        least, most = tl.where(same, least, middle + 1), tl.where(same, middle, most)
    return most


@triton.jit
def end_of_bucket(buckets, bucket, slot, valid, reach, final, steps):
    """One after the last slot of the slots' `bucket`, at most `reach` after each and not after `final`."""
    least, most = slot, tl.maximum(tl.minimum(slot + reach, final), slot)
    for _ in range(steps):
        middle = (least + most + 1) // 2
        same = load_numbers(buckets, middle, valid) == bucket
        least, most = tl.where(same, middle, least), tl.where(same, most, middle - 1)
    return least + 1


@triton.jit(do_not_specialize=INTEGERS)
def fill_history(
    positions, buckets, slots, low, high, real_lengths,
    positions_row, positions_round, buckets_row, buckets_round, length, reach, rounds, steps,
    N_TABLES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """For BLOCK slots of a round, at their positions: the slot; the first slot of its bucket among the `reach` before
    it (low); one after the last among the `reach` after it (high). steps: 2^steps > reach."""
    blocks = tl.cdiv(length, BLOCK)
    line = (tl.program_id(0) // blocks).to(tl.int64)
    row, number = line // rounds, line % rounds
    slot = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    valid = slot < length
    place = positions + row * positions_row + number * positions_round
    position = load_numbers(place, slot, valid) + line * length
    tl.store(slots + position, slot, mask=valid)
    if N_TABLES > 1:
        buckets += row * buckets_row + number * buckets_round
        bucket = load_numbers(buckets, slot, valid)
        tl.store(low + position, first_of_bucket(buckets, bucket, slot, valid, reach, steps), mask=valid)
    if N_TABLES > 2:
        final = tl.load(real_lengths + row).to(tl.int32) - 1
        tl.store(
            high + position, end_of_bucket(buckets, bucket, slot, valid, reach, final, steps), mask=valid
        )
