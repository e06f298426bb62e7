"""Which pairs count, as intervals: every slot of a program makes pairs with the slots [low, low + size) of a round.

With both rules the keys of a query are neighbouring slots, and so are the queries of a key: one comparison for each
pair tells whether it counts. Only the causal rule `chunk`, a position's own key where it lies within the interval, and
`once` need more. Rule `window` looks the borders of buckets up in `Tables`.
"""

# Device code has no Python types.
# mypy: allow-untyped-defs

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from megabase.models.attention.kernels.triton.memory import load_numbers
from megabase.models.attention.kernels.triton.pairs import History


class Block(NamedTuple):
    """The slots of one program, and the round of the row that they belong to.

    positions, slot_low, slot_high: addresses of the row's tables (rounds, length). number: of this round; rounds: how
    many there are. start, stop: the slots [start, stop) of the program that hold real positions. reach: see `Rule`.
    count: real positions of the row.
    """

    positions: Any
    slot_low: Any
    slot_high: Any
    length: Any
    number: Any
    rounds: Any
    start: Any
    stop: Any
    reach: Any
    count: Any


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
def positions_of_round(block, number):
    """Address of the positions of a round of the block's row."""
    return block.positions + number.to(tl.int64) * block.length


@triton.jit
def block_of_program(
    positions, slot_low, slot_high, slots, low, high, real_lengths, length, reach, rounds, OWN: tl.constexpr
):
    """The program's Block and History, its row, and row · rounds + round. Rows and rounds follow each other in the
    order of memory, so that the rounds of a row run at about the same time."""
    blocks = tl.cdiv(length, OWN)
    line = tl.program_id(0) // blocks
    row, number = (line // rounds).to(tl.int64), line % rounds
    start = tl.program_id(0) % blocks * OWN
    at = row * rounds * length
    history = History(slots + at, low + at, high + at, length)
    count = tl.load(real_lengths + row).to(tl.int32)
    block = Block(
        positions + at, slot_low + at, slot_high + at, length,
        number, rounds, start, tl.minimum(start + OWN, count), reach, count,
    )  # fmt: skip
    return block, history, row, line.to(tl.int64)


@triton.jit
def keys_of(
    block, slot, valid,
    RING: tl.constexpr, WINDOW: tl.constexpr, CAUSAL: tl.constexpr, EXCLUDES_OWN: tl.constexpr,
):  # fmt: skip
    """The Partners of the block's slots as queries."""
    reach, count, start, stop, number = block.reach, block.count, block.start, block.stop, block.number
    final = tl.maximum(stop - 1, 0)
    if RING:
        number = (number + block.rounds - 1) % block.rounds
        first = tl.maximum(count - 1, 0) // reach * reach
        last = tl.where(start < reach, count, first)
        low, high = tl.where(slot < reach, first, count), slot * 0 + count
    elif WINDOW:
        table = block.slot_low + number.to(tl.int64) * block.length
        first = tl.load(table + tl.minimum(start, final))
        low = load_numbers(table, slot, valid)
        if CAUSAL:
            last, high = stop, (slot if EXCLUDES_OWN else slot + 1)
        else:
            table = block.slot_high + number.to(tl.int64) * block.length
            last = tl.load(table + final)
            high = load_numbers(table, slot, valid)
    else:
        chunk = slot // reach
        low, high = tl.maximum(chunk - 1, 0) * reach, tl.minimum((chunk + 1) * reach, count)
        first, last = (
            tl.maximum(start // reach - 1, 0) * reach,
            tl.minimum((final // reach + 1) * reach, count),
        )
    return Partners(number, first, tl.where(start < stop, last, first), low, tl.where(valid, high - low, 0))


@triton.jit
def queries_of(
    block, slot, valid,
    RING: tl.constexpr, WINDOW: tl.constexpr, CAUSAL: tl.constexpr, EXCLUDES_OWN: tl.constexpr,
):  # fmt: skip
    """The Partners of the block's slots as keys."""
    reach, count, start, stop, number = block.reach, block.count, block.start, block.stop, block.number
    final = tl.maximum(stop - 1, 0)
    if RING:
        number = (number + 1) % block.rounds
        ring = tl.maximum(count - 1, 0) // reach * reach
        first = start * 0
        last = tl.where(stop > ring, tl.minimum(reach, count), 0)
        low, high = slot * 0, tl.where(slot >= ring, tl.minimum(reach, count), 0)
    elif WINDOW:
        table = block.slot_high + number.to(tl.int64) * block.length
        last = tl.load(table + final)
        high = load_numbers(table, slot, valid)
        if CAUSAL:
            first, low = start, (slot + 1 if EXCLUDES_OWN else slot)
        else:
            table = block.slot_low + number.to(tl.int64) * block.length
            first = tl.load(table + tl.minimum(start, final))
            low = load_numbers(table, slot, valid)
    else:
        chunk = slot // reach
        low, high = chunk * reach, tl.minimum((chunk + 2) * reach, count)
        first, last = start // reach * reach, tl.minimum((final // reach + 2) * reach, count)
    return Partners(number, first, tl.where(start < stop, last, first), low, tl.where(valid, high - low, 0))


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
