"""Which keys a query attends to, computed on the device from slots, buckets and chunks, without tables.

Rule `window`: two slots of one bucket, at most `reach` apart. Since a bucket's slots are in the order of positions, the
slots before a query's own are causal. Rule `chunk`: the numbers of the two chunks differ by 0 or 1; causality compares
positions. Its ring (RING below) joins the rounds: the first chunk of a round attends to the last chunk of the round
before.

Only `once` needs tables (`History`): with them, one comparison for each earlier round tells whether that round had the
pair already. In names, q_ belongs to queries and k_ to keys.
"""

# Device code has no Python types.
# mypy: allow-untyped-defs

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from megabase.models.attention.kernels.triton.memory import load_numbers

NO_QUERY = tl.constexpr(-2147483648)
NO_KEY = tl.constexpr(-2147483640)
"""Labels of slots that take part in no pair. They differ from each other, and by more than 1."""


class Block(NamedTuple):
    """The slots of one program, and the round of the row that they belong to.

    positions: address of the row's positions; round_step: elements from one round's positions to the next one's.
    buckets: address of this round's buckets. number: of this round; rounds: how many there are. start, stop: the
    slots [start, stop) of the program that hold real positions. reach: see `Rule`. count: real positions of the row.
    """

    positions: Any
    round_step: Any
    buckets: Any
    number: Any
    rounds: Any
    start: Any
    stop: Any
    reach: Any
    count: Any


class Slots(NamedTuple):
    """One side of some pairs. label: the bucket of a slot (rule `window`) or its chunk."""

    slot: Any
    label: Any
    position: Any


class History(NamedTuple):
    """For `once`, addresses of tables (rounds, length) of one row, by position.

    slots: the slot. low, high: the slots [low, high) that the position attends to; rule `chunk` needs neither, and
    the causal rule no `high`.
    """

    slots: Any
    low: Any
    high: Any
    length: Any


@triton.jit
def column(x):
    """Slots (n, 1)."""
    return Slots(x.slot[:, None], x.label[:, None], x.position[:, None])


@triton.jit
def line(x):
    """Slots (1, n)."""
    return Slots(x.slot[None, :], x.label[None, :], x.position[None, :])


@triton.jit
def positions_of_round(block, number):
    """Address of the positions of a round of the block's row."""
    return block.positions + number.to(tl.int64) * block.round_step


@triton.jit
def load_label(block, slot, valid, NONE: tl.constexpr, WINDOW: tl.constexpr):
    """The labels of slots, NONE where not valid."""
    label = load_numbers(block.buckets, slot, valid) if WINDOW else slot // block.reach
    return tl.where(valid, label, NONE)


@triton.jit
def keys_in_reach(
    block, slot, valid,
    RING: tl.constexpr, WINDOW: tl.constexpr, CAUSAL: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """For the block's slots as queries: the slots [first, last) of their keys, the queries' labels, and the address of
    the keys' positions."""
    if RING:
        first = tl.maximum(block.count - 1, 0) // block.reach * block.reach
        last = tl.where(block.start < block.reach, block.count, first)
        label = tl.where(valid & (slot < block.reach), 1, NO_QUERY)
        positions = positions_of_round(block, (block.number + block.rounds - 1) % block.rounds)
    else:
        first, last = span(block, WINDOW, True, WINDOW and not CAUSAL, STEP)
        label = load_label(block, slot, valid, NO_QUERY, WINDOW)
        positions = positions_of_round(block, block.number)
    return first, last, label, positions


@triton.jit
def queries_in_reach(
    block, slot, valid,
    RING: tl.constexpr, WINDOW: tl.constexpr, CAUSAL: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """For the block's slots as keys: the slots [first, last) of queries that attend to them, the keys' labels, and the
    address of the queries' positions."""
    if RING:
        chunk = tl.maximum(block.count - 1, 0) // block.reach
        first = 0
        last = tl.where(block.stop > chunk * block.reach, tl.minimum(block.reach, block.count), 0)
        label = tl.where(valid & (slot >= chunk * block.reach), 0, NO_KEY)
        positions = positions_of_round(block, (block.number + 1) % block.rounds)
    else:
        first, last = span(block, WINDOW, WINDOW and not CAUSAL, True, STEP)
        label = load_label(block, slot, valid, NO_KEY, WINDOW)
        positions = positions_of_round(block, block.number)
    return first, last, label, positions


@triton.jit
def load_slots(
    block, positions, begin, last,
    RING_LABEL: tl.constexpr, NONE: tl.constexpr, RING: tl.constexpr, WINDOW: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    """The Slots from `begin` on, STEP of them, and which of them lie before `last`."""
    slot = begin + tl.arange(0, STEP)
    valid = slot < last
    position = load_numbers(positions, slot, valid)
    label = tl.where(valid, RING_LABEL, NONE) if RING else load_label(block, slot, valid, NONE, WINDOW)
    return Slots(slot, label, position), valid


@triton.jit
def pair_counts(
    query, key, block, history,
    WINDOW: tl.constexpr, CAUSAL: tl.constexpr, EXCLUDES_OWN: tl.constexpr, ONCE: tl.constexpr,
    RING: tl.constexpr, ROUND: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    """Whether the query attends to the key here: under the rule, and (ONCE) in no earlier round."""
    counts = _attends(query, key, block.reach, WINDOW and not RING, CAUSAL, EXCLUDES_OWN)
    if ONCE and ROUND + RING > 0:
        counts = counts & ~_attended_before(
            query.position, key.position, block, history, WINDOW, CAUSAL, RING, ROUND, ROUNDS
        )
    return counts


@triton.jit
def _attends(query, key, reach, WINDOW: tl.constexpr, CAUSAL: tl.constexpr, EXCLUDES_OWN: tl.constexpr):
    """Whether the query attends to the key under the rule, in one round. Differences are compared as unsigned numbers:
    one comparison tells whether they lie in [0, limit]."""
    if WINDOW:
        distance = query.slot - key.slot
        if CAUSAL:
            attends = (query.label == key.label) & (distance.to(tl.uint32, bitcast=True) <= reach)
        else:
            attends = (query.label == key.label) & (
                (distance + reach).to(tl.uint32, bitcast=True) <= 2 * reach
            )
        if EXCLUDES_OWN:
            attends = attends & (distance != 0)
    else:
        attends = (query.label - key.label).to(tl.uint32, bitcast=True) <= 1
        if CAUSAL:
            attends = attends & (key.position <= query.position)
        if EXCLUDES_OWN:
            attends = attends & (key.position != query.position)
    return attends


@triton.jit
def _attended_before(
    q_position, k_position, block, history,
    WINDOW: tl.constexpr, CAUSAL: tl.constexpr, RING: tl.constexpr, ROUND: tl.constexpr,
    ROUNDS: tl.constexpr,
):  # fmt: skip
    """Whether a round before ROUND had the pair. RING: also whether the chunks of ROUND itself had it."""
    slots, low, high, length, reach = history.slots, history.low, history.high, history.length, block.reach
    attended = (q_position < 0) & (k_position < 0)
    for other in tl.static_range(ROUND + RING):
        k_slot = tl.load(slots + other * length + k_position)
        if WINDOW:
            q_low = tl.load(low + other * length + q_position)
            # Causal: up to the query's own slot.
            q_high = tl.load((slots if CAUSAL else high) + other * length + q_position) + CAUSAL
            attended = attended | (
                (k_slot - q_low).to(tl.uint32, bitcast=True) < (q_high - q_low).to(tl.uint32, bitcast=True)
            )
        else:
            q_slot = tl.load(slots + other * length + q_position)
            attended = attended | ((q_slot // reach - k_slot // reach).to(tl.uint32, bitcast=True) <= 1)
            if other < ROUND:
                k_slot = tl.load(slots + ((other + ROUNDS - 1) % ROUNDS) * length + k_position)
                attended = attended | ((q_slot < reach) & (k_slot // reach == (block.count - 1) // reach))
    return attended


@triton.jit
def span(block, WINDOW: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr, STEP: tl.constexpr):
    """The slots [first, last) that the block's slots make pairs with: their own, and those BEFORE and AFTER them."""
    start, stop, reach, count, buckets = block.start, block.stop, block.reach, block.count, block.buckets
    final = tl.maximum(stop - 1, 0)
    if WINDOW:
        first, last = start, stop
        if BEFORE:
            bucket = tl.load(buckets + tl.minimum(start, final)).to(tl.int32)
            first -= neighbours(buckets, bucket, start, reach, count, False, STEP)
        if AFTER:
            bucket = tl.load(buckets + final).to(tl.int32)
            last += neighbours(buckets, bucket, stop, reach, count, True, STEP)
    else:
        first, last = start // reach * reach, (final // reach + 1) * reach
        if BEFORE:
            first = tl.maximum(first - reach, 0)
        if AFTER:
            last += reach
        last = tl.minimum(last, count)
    # Empty if no slot of the block holds a real position.
    return first, tl.where(start < stop, last, first)


@triton.jit
def neighbours(buckets, bucket, slot, reach, count, AFTER: tl.constexpr, STEP: tl.constexpr):
    """How many of the `reach` slots before `slot` (AFTER: from `slot` on) hold `bucket`. Since slots are sorted, the
    count tells where the bucket begins or ends."""
    found = tl.zeros((STEP,), dtype=tl.int32)
    for begin in range(0, reach, STEP):
        offset = begin + tl.arange(0, STEP)
        place = slot + offset if AFTER else slot - 1 - offset
        valid = (offset < reach) & (place >= 0) & (place < count)
        found += (valid & (load_numbers(buckets, place, valid) == bucket)).to(tl.int32)
    return tl.sum(found, axis=0)
