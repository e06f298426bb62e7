"""The forward pass of all rounds, and the merge of their outputs.

A round's output is rounded to the dtype of the values (fp32 stays fp32) and lies at its position: (rows, rounds,
length, width). So the merge reads and writes in the order of memory. It adds the rounds in the order of their numbers:
the same input gives the same bits.
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
    load_numbers,
    load_rows,
    pair_scale,
    product,
    store_rows,
)
from megabase.models.attention.kernels.triton.tiles import INTEGERS
from megabase.models.attention.kernels.triton.together.pairs import (
    block_of_program,
    keys_of,
    pair_counts,
    positions_of_round,
)

NOTHING = tl.constexpr(-1e30)
"""The log-sum-exp of a position that attends to nothing."""
NOT_REAL = tl.constexpr(-2e30)
"""The log-sum-exp of a position that is not real: it does not take its own value either."""
BETWEEN = tl.constexpr(-1.5e30)


@triton.jit(do_not_specialize=INTEGERS)
def forward_rounds(
    q, k, v, partial_out, partial_lse, scales,
    positions, slot_low, slot_high, slots, low, high, real_lengths, drop_keys, least, kept, length, reach, rounds,
    q_row, q_step, k_row, k_step, v_row, v_step,
    ROUNDS: tl.constexpr, WINDOW: tl.constexpr, CAUSAL: tl.constexpr, EXCLUDES_OWN: tl.constexpr,
    ONCE: tl.constexpr, DROPOUT: tl.constexpr, UNIT: tl.constexpr,
    D: tl.constexpr, PAD: tl.constexpr, D_V: tl.constexpr, PAD_V: tl.constexpr,
    OWN: tl.constexpr, OTHER: tl.constexpr,
):  # fmt: skip
    """OWN slots of a round as queries: the round's partial_out and partial_lse, in powers of 2, at their positions.

    A position that attends to nothing in the round gets no partial_out. Long because a kernel's parameters are what
    `Launch` passes (see `forward_round`).
    """
    block, history, row, line = block_of_program(
        positions, slot_low, slot_high, slots, low, high, real_lengths, length, reach, rounds, OWN
    )
    dropout = Dropout(tl.load(drop_keys + row) if DROPOUT else 0, least, kept)
    keys, values = Rows(k + row * k_row, k_step), Rows(v + row * v_row, v_step)
    slot = block.start + tl.arange(0, OWN)
    inside, valid = slot < length, slot < block.count
    position = load_numbers(positions_of_round(block, block.number), slot, inside)
    query = load_rows(Rows(q + row * q_row, q_step), position, valid, D, PAD)
    acc = tl.zeros((OWN, PAD_V), dtype=tl.float32)
    peak = tl.full((OWN,), NOTHING, dtype=tl.float32)
    total = tl.zeros((OWN,), dtype=tl.float32)
    for RING in tl.static_range(1 if WINDOW else 2):
        partners = keys_of(block, slot, valid, RING, WINDOW, CAUSAL, EXCLUDES_OWN)
        other_positions = positions_of_round(block, partners.number)
        other_scales = scales + (row * rounds + partners.number) * length
        for begin in range(partners.first, partners.last, OTHER):
            other = begin + tl.arange(0, OTHER)
            exists = other < partners.last
            other_position = load_numbers(other_positions, other, exists)
            key = load_rows(keys, other_position, exists, D, PAD)
            value = load_rows(values, other_position, exists, D_V, PAD_V)
            scores = product(query, tl.trans(key))
            if UNIT:
                scale = tl.load(other_scales + begin + tl.arange(0, OTHER), mask=exists, other=0.0)
                scores *= (scale * LOG2_E)[None, :]
            else:
                scores *= LOG2_E
            counts = pair_counts(
                partners, other, position[:, None], other_position[None, :], block.number, block, history,
                WINDOW, CAUSAL, EXCLUDES_OWN, ONCE, RING, ROUNDS,
            )  # fmt: skip
            scores = tl.where(counts, scores, float("-inf"))
            new_peak = tl.maximum(peak, tl.max(scores, axis=1))
            shrink = tl.exp2(peak - new_peak)
            weights = tl.exp2(scores - new_peak[:, None])
            total = total * shrink + tl.sum(weights, axis=1)
            if DROPOUT:
                weights = weights * pair_scale(position[:, None], other_position[None, :], dropout)
            acc = add_product(acc * shrink[:, None], weights.to(value.dtype), value)
            peak = new_peak
    met = total != 0.0  # true of NaN, which must reach the output
    total = tl.where(met, total, 1.0)
    partial_out = Rows(partial_out + line * length * D_V, D_V)
    store_rows(partial_out, position, inside & met, acc * (1.0 / total)[:, None], D_V, PAD_V)
    lse = tl.where(met, peak + tl.log2(total), tl.where(valid, NOTHING, NOT_REAL))
    tl.store(partial_lse + line * length + position, lse, mask=inside)


@triton.jit
def merge_rounds(
    partial_out, partial_lse, v, out, lse, drop_keys, least, kept, length, v_row, v_step,
    ROUNDS: tl.constexpr, OWN_IF_ALONE: tl.constexpr, DROPOUT: tl.constexpr,
    D_V: tl.constexpr, PAD_V: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out and lse of BLOCK positions: the mean of the rounds' outputs, each weighted by 2^partial_lse."""
    row, position, valid = positions_of_program(length, BLOCK)
    partial_lse += row * ROUNDS * length + position
    peak = tl.load(partial_lse, mask=valid, other=NOT_REAL)
    for number in tl.static_range(1, ROUNDS):
        peak = tl.maximum(peak, tl.load(partial_lse + number * length, mask=valid, other=NOT_REAL))
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    acc = tl.zeros((BLOCK, PAD_V), dtype=tl.float32)
    for number in tl.static_range(ROUNDS):
        round_lse = tl.load(partial_lse + number * length, mask=valid, other=NOT_REAL)
        met = ~(round_lse <= NOTHING)
        weight = tl.where(met, tl.exp2(round_lse - peak), 0.0)
        total += weight
        round_out = Rows(partial_out + (row * ROUNDS + number) * length * D_V, D_V)
        acc += weight[:, None] * load_rows(round_out, position, met, D_V, PAD_V).to(tl.float32)
    alone = total == 0.0
    total = tl.where(alone, 1.0, total)
    acc = acc * (1.0 / total)[:, None]
    if OWN_IF_ALONE:
        # A position that attends to nothing takes its own value.
        real = alone & (peak > BETWEEN)
        own_value = load_rows(Rows(v + row * v_row, v_step), position, real, D_V, PAD_V).to(tl.float32)
        if DROPOUT:
            dropout = Dropout(tl.load(drop_keys + row), least, kept)
            own_value = own_value * pair_scale(position, position, dropout)[:, None]
        acc = tl.where(real[:, None], own_value, acc)
    store_rows(Rows(out + row * v_row, v_step), position, valid, acc, D_V, PAD_V)
    tl.store(lse + row * length + position, tl.where(alone, peak, peak + tl.log2(total)), mask=valid)


@triton.jit
def positions_of_program(length, BLOCK: tl.constexpr):
    """The row and the BLOCK positions of a program that combines rounds, and which of them exist.

    The last row comes first: its partial results were written last, and some are still in the cache.
    """
    blocks = tl.cdiv(length, BLOCK)
    row = ((tl.num_programs(0) - 1 - tl.program_id(0)) // blocks).to(tl.int64)
    position = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    return row, position, position < length
