"""Which pairs count, as intervals: every slot of a program makes pairs with the slots [low, low + size) of a round.

With both rules the keys of a query are neighbouring slots, and so are the queries of a key. A program computes the
interval of each of its slots once, from its buckets; then one comparison for each pair tells whether it counts. Only
the causal rule `chunk`, a position's own key where it lies within the interval, and `once` need more.
"""

# Device code has no Python types.
# mypy: allow-untyped-defs

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from megabase.models.attention.kernels.triton.memory import load_numbers
from megabase.models.attention.kernels.triton.pairs import Block, History, span


class Partners(NamedTuple):
    """With which slots the slots of a program make pairs.

    number: the round of these slots. first, last: all of them lie in [first, last). low, size: (OWN,), the interval
    [low, low + size) of each slot of the program.
    """

    number: Any
    first: Any
    last: Any
    low: Any
    size: Any


@triton.jit
def block_of_program(
    positions, buckets, slots, low, high, real_lengths,
    positions_row, positions_round, buckets_row, buckets_round, length, reach, rounds, OWN: tl.constexpr,
):  # fmt: skip
    """The program's Block and History, its row, and row · rounds + round. Rows and rounds follow each other in the
    order of memory, so that the rounds of a row run at about the same time."""
    blocks = tl.cdiv(length, OWN)
    line = tl.program_id(0) // blocks
    row, number = (line // rounds).to(tl.int64), line % rounds
    start = tl.program_id(0) % blocks * OWN
    history_start = row * rounds * length
    history = History(slots + history_start, low + history_start, high + history_start, length)
    count = tl.load(real_lengths + row).to(tl.int32)
    block = Block(
        positions + row * positions_row, positions_round,
        buckets + row * buckets_row + number.to(tl.int64) * buckets_round,
        number, rounds, start, tl.minimum(start + OWN, count), reach, count,
    )  # fmt: skip
    return block, history, row, line.to(tl.int64)


@triton.jit
def keys_of(
    block, slot, valid,
    RING: tl.constexpr, WINDOW: tl.constexpr, CAUSAL: tl.constexpr, EXCLUDES_OWN: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """The Partners of the block's slots as queries."""
    reach, count = block.reach, block.count
    if RING:
        number = (block.number + block.rounds - 1) % block.rounds
        first = tl.maximum(count - 1, 0) // reach * reach
        last = tl.where(block.start < reach, count, first)
        low, size = tl.where(valid, first, 0), tl.where(valid & (slot < reach), count - first, 0)
    else:
        number = block.number
        first, last = span(block, WINDOW, True, WINDOW and not CAUSAL, STEP)
        if WINDOW:
            low = slot - tl.minimum(_same_before(block, slot, valid, first), reach)
            if CAUSAL:
                high = slot if EXCLUDES_OWN else slot + 1
            else:
                high = slot + 1 + tl.minimum(_same_after(block, slot, valid, last), reach)
        else:
            chunk = slot // reach
            low, high = tl.maximum(chunk - 1, 0) * reach, tl.minimum((chunk + 1) * reach, count)
        size = tl.where(valid, high - low, 0)
    return Partners(number, first, last, low, size)


@triton.jit
def queries_of(
    block, slot, valid,
    RING: tl.constexpr, WINDOW: tl.constexpr, CAUSAL: tl.constexpr, EXCLUDES_OWN: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """The Partners of the block's slots as keys."""
    reach, count = block.reach, block.count
    if RING:
        number = (block.number + 1) % block.rounds
        ring = tl.maximum(count - 1, 0) // reach * reach
        first = 0
        last = tl.where(block.stop > ring, tl.minimum(reach, count), 0)
        low, size = tl.where(valid, 0, 0), tl.where(valid & (slot >= ring), tl.minimum(reach, count), 0)
    else:
        number = block.number
        first, last = span(block, WINDOW, WINDOW and not CAUSAL, True, STEP)
        if WINDOW:
            high = slot + 1 + tl.minimum(_same_after(block, slot, valid, last), reach)
            if CAUSAL:
                low = slot + 1 if EXCLUDES_OWN else slot
            else:
                low = slot - tl.minimum(_same_before(block, slot, valid, first), reach)
        else:
            chunk = slot // reach
            low, high = chunk * reach, tl.minimum((chunk + 2) * reach, count)
        size = tl.where(valid, high - low, 0)
    return Partners(number, first, last, low, size)


@triton.jit
def _same_before(block, slot, valid, first):
    """How many slots from `first` to each slot hold its bucket; those from `first` to the block hold its first one."""
    bucket = load_numbers(block.buckets, slot, valid)
    same = (bucket[:, None] == bucket[None, :]) & (slot[None, :] < slot[:, None])
    begun = tl.load(block.buckets + tl.minimum(block.start, tl.maximum(block.stop - 1, 0))).to(tl.int32)
    return tl.sum(same.to(tl.int32), axis=1) + tl.where(bucket == begun, block.start - first, 0)


@triton.jit
def _same_after(block, slot, valid, last):
    """How many slots after each slot, up to `last`, hold its bucket; those after the block hold its last one."""
    bucket = load_numbers(block.buckets, slot, valid)
    same = (bucket[:, None] == bucket[None, :]) & (slot[None, :] > slot[:, None]) & valid[None, :]
    ended = tl.load(block.buckets + tl.maximum(block.stop - 1, 0)).to(tl.int32)
    return tl.sum(same.to(tl.int32), axis=1) + tl.where(bucket == ended, last - block.stop, 0)


@triton.jit
def pair_counts(
    partners, other_slot, q_position, k_position, q_round, block, history,
    WINDOW: tl.constexpr, CAUSAL: tl.constexpr, EXCLUDES_OWN: tl.constexpr, ONCE: tl.constexpr,
    RING: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    """Whether a slot of the program (rows) makes a pair with another slot (columns), and (ONCE) no round before q_round
    has the pair. Positions have shapes (rows, 1) and (1, columns), or the reverse."""
    offset = other_slot[None, :] - partners.low[:, None]
    counts = offset.to(tl.uint32, bitcast=True) < partners.size[:, None].to(tl.uint32, bitcast=True)
    if CAUSAL and not WINDOW:
        counts = counts & (k_position <= q_position)
    if EXCLUDES_OWN and not (WINDOW and CAUSAL):
        counts = counts & (k_position != q_position)
    if ONCE:
        counts = counts & ~_attended_before(
            q_position, k_position, q_round, block, history, WINDOW, CAUSAL, RING, ROUNDS
        )
    return counts


@triton.jit
def _attended_before(
    q_position, k_position, q_round, block, history,
    WINDOW: tl.constexpr, CAUSAL: tl.constexpr, RING: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    """Whether a round before q_round had the pair. RING: also whether the chunks of q_round itself had it."""
    attended = (q_position < 0) & (k_position < 0)
    for other in tl.static_range(ROUNDS - 1 + RING):
        if other < q_round + RING:
            attended = attended | _attended_in(
                other, other < q_round, q_position, k_position, block, history, WINDOW, CAUSAL, ROUNDS
            )
    return attended


@triton.jit
def _attended_in(
    other, ring, q_position, k_position, block, history,
    WINDOW: tl.constexpr, CAUSAL: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    """Whether the round `other` had the pair: in one of its buckets, in its chunks, or (ring) over its ring."""
    slots, low, high, length, reach = history.slots, history.low, history.high, history.length, block.reach
    k_slot = tl.load(slots + other * length + k_position)
    if WINDOW:
        q_low = tl.load(low + other * length + q_position)
        # Causal: up to the query's own slot.
        q_high = tl.load((slots if CAUSAL else high) + other * length + q_position) + CAUSAL
        found = (k_slot - q_low).to(tl.uint32, bitcast=True) < (q_high - q_low).to(tl.uint32, bitcast=True)
    else:
        q_slot = tl.load(slots + other * length + q_position)
        found = (q_slot // reach - k_slot // reach).to(tl.uint32, bitcast=True) <= 1
        if ring:
            k_slot = tl.load(slots + ((other + ROUNDS - 1) % ROUNDS) * length + k_position)
            found = found | ((q_slot < reach) & (k_slot // reach == (block.count - 1) // reach))
    return found
