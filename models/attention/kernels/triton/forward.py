"""The forward pass of one round, and the scales that make unit keys of queries.

The merge of rounds is the online softmax itself: a round starts from the output and the log-sum-exp that earlier rounds
left, as if they were one more block of keys.
"""

# Device code has no Python types.
# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

from megabase.models.attention.kernels.triton.memory import (
    LOG2_E,
    Dropout,
    Rows,
    add_product,
    begin_sums,
    finish_sums,
    load_numbers,
    load_rows,
    pair_scale,
    product,
    unit_scale,
)
from megabase.models.attention.kernels.triton.pairs import (
    NO_KEY,
    Block,
    History,
    Slots,
    column,
    keys_in_reach,
    line,
    load_slots,
    pair_counts,
    positions_of_round,
)
from megabase.models.attention.kernels.triton.tiles import INTEGERS


@triton.jit(do_not_specialize=INTEGERS)
def forward_round(
    q, k, v, out, partial_out, lse, scales,
    positions, buckets, slots, low, high, real_lengths, drop_keys, least, kept,
    positions_row, positions_round, buckets_row, buckets_round, length, reach, number, rounds,
    q_row, q_step, k_row, k_step, v_row, v_step,
    ROUND: tl.constexpr, ROUNDS: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
    WINDOW: tl.constexpr, CAUSAL: tl.constexpr, EXCLUDES_OWN: tl.constexpr, ONCE: tl.constexpr,
    OWN_IF_ALONE: tl.constexpr, DROPOUT: tl.constexpr, UNIT: tl.constexpr,
    D: tl.constexpr, PAD: tl.constexpr, D_V: tl.constexpr, PAD_V: tl.constexpr,
    OWN: tl.constexpr, OTHER: tl.constexpr,
):  # fmt: skip
    """Round `number` for OWN slots as queries: out (or partial_out) and lse, in powers of 2, at their positions.

    Long because a kernel's parameters are what `launch.Launch` passes: Triton would compile integers in a tuple into
    the code (do_not_specialize does not reach them), and 3.3 has no tuples of constants.
    """
    blocks = tl.cdiv(length, OWN)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    start = tl.program_id(0) % blocks * OWN
    history_start = row * rounds * length
    history = History(slots + history_start, low + history_start, high + history_start, length)
    count = tl.load(real_lengths + row).to(tl.int32)
    block = Block(
        positions + row * positions_row, positions_round,
        buckets + row * buckets_row + number.to(tl.int64) * buckets_round,
        number, rounds, start, tl.minimum(start + OWN, count), reach, count,
    )  # fmt: skip
    dropout = Dropout(tl.load(drop_keys + row) if DROPOUT else 0, least, kept)
    keys, values, lse = Rows(k + row * k_row, k_step), Rows(v + row * v_row, v_step), lse + row * length
    out, partial_out = Rows(out + row * v_row, v_step), Rows(partial_out + row * length * D_V, D_V)

    slot = start + tl.arange(0, OWN)
    inside, valid = slot < length, slot < count
    position = load_numbers(positions_of_round(block, number), slot, inside)
    query = load_rows(Rows(q + row * q_row, q_step), position, valid, D, PAD)
    acc = begin_sums(partial_out, position, valid, FIRST, OWN, D_V, PAD_V)
    no_peak = tl.full((OWN,), -1e30, dtype=tl.float32)
    peak = no_peak if FIRST else tl.load(lse + position, mask=valid, other=-1e30)
    total = tl.where(peak > -1e29, 1.0, 0.0)

    for RING in tl.static_range(1 if WINDOW else 2):
        first, last, label, key_positions = keys_in_reach(block, slot, valid, RING, WINDOW, CAUSAL, OTHER)
        queries = column(Slots(slot, label, position))
        for begin in range(first, last, OTHER):
            other, other_valid = load_slots(block, key_positions, begin, last, 0, NO_KEY, RING, WINDOW, OTHER)
            key = load_rows(keys, other.position, other_valid, D, PAD)
            value = load_rows(values, other.position, other_valid, D_V, PAD_V)
            scores = product(query, tl.trans(key)) * LOG2_E
            if UNIT:
                scores *= tl.load(scales + row * length + other.position, mask=other_valid, other=0.0)[
                    None, :
                ]
            counts = pair_counts(
                queries, line(other), block, history, WINDOW, CAUSAL, EXCLUDES_OWN, ONCE, RING, ROUND, ROUNDS
            )
            scores = tl.where(counts, scores, float("-inf"))
            new_peak = tl.maximum(peak, tl.max(scores, axis=1))
            shrink = tl.exp2(peak - new_peak)
            weights = tl.exp2(scores - new_peak[:, None])
            total = total * shrink + tl.sum(weights, axis=1)
            if DROPOUT:
                weights = weights * pair_scale(position[:, None], other.position[None, :], dropout)
            acc = add_product(acc * shrink[:, None], weights.to(value.dtype), value)
            peak = new_peak

    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    acc = acc / total[:, None]
    if LAST and OWN_IF_ALONE:
        # A position that attends to nothing takes its own value.
        own_value = load_rows(values, position, valid & empty, D_V, PAD_V).to(tl.float32)
        if DROPOUT:
            own_value = own_value * pair_scale(position, position, dropout)[:, None]
        acc = tl.where(empty[:, None], own_value, acc)
    finish_sums(partial_out, out, position, inside, acc, LAST, D_V, PAD_V)
    tl.store(lse + position, tl.where(empty, -1e30, peak + tl.log2(total)), mask=inside)


@triton.jit
def unit_scales(q, scales, length, q_row, q_step, D: tl.constexpr, PAD: tl.constexpr, BLOCK: tl.constexpr):
    """The factors that make unit keys of BLOCK queries."""
    blocks = tl.cdiv(length, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    position = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    valid = position < length
    x = load_rows(Rows(q + row * q_row, q_step), position, valid, D, PAD)
    tl.store(scales + row * length + position, unit_scale(x, D), mask=valid)
