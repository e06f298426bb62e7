"""All rounds in one launch: kernels that leave a partial result for each round, and kernels that combine them.

A round's partial result is rounded to the dtype of the tensor it is part of (fp32 stays fp32) and lies at its position:
(rows, rounds, length, width). So the kernel that combines the rounds reads and writes in the order of memory. It adds
the rounds in the order of their numbers: the same input gives the same bits.

Programs that follow each other compute the rounds of one row, which read the same queries, keys and values: if those
of a row fit into the level-2 cache, the later rounds find them there.
"""

# Device code has no Python types.
# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

from megabase.models.attention.kernels.triton.backward import (
    Row,
    add_from_keys,
    add_from_queries,
    gradient_of_unit,
)
from megabase.models.attention.kernels.triton.forward import attend_to_keys
from megabase.models.attention.kernels.triton.memory import (
    Dropout,
    Rows,
    load_numbers,
    load_rows,
    pair_scale,
    reload_numbers,
    store_rows,
)
from megabase.models.attention.kernels.triton.pairs import Block, History, positions_of_round
from megabase.models.attention.kernels.triton.tiles import INTEGERS

NOTHING = tl.constexpr(-1e30)
"""The log-sum-exp of a position that attends to nothing."""
NOT_REAL = tl.constexpr(-2e30)
"""The log-sum-exp of a position that is not real: it does not take its own value either."""
BETWEEN = tl.constexpr(-1.5e30)


@triton.jit(do_not_specialize=INTEGERS)
def forward_rounds(
    q, k, v, partial_out, partial_lse, scales,
    positions, buckets, slots, low, high, real_lengths, drop_keys, least, kept,
    positions_row, positions_round, buckets_row, buckets_round, length, reach, rounds,
    q_row, q_step, k_row, k_step, v_row, v_step,
    ROUNDS: tl.constexpr, WINDOW: tl.constexpr, CAUSAL: tl.constexpr, EXCLUDES_OWN: tl.constexpr,
    ONCE: tl.constexpr, DROPOUT: tl.constexpr, UNIT: tl.constexpr,
    D: tl.constexpr, PAD: tl.constexpr, D_V: tl.constexpr, PAD_V: tl.constexpr,
    OWN: tl.constexpr, OTHER: tl.constexpr,
):  # fmt: skip
    """OWN slots of a round as queries: the round's partial_out and partial_lse, in powers of 2, at their positions.

    A position that attends to nothing in the round gets no partial_out.
    """
    block, history, dropout, row, line = _block_of_program(
        positions, buckets, slots, low, high, real_lengths, drop_keys, least, kept,
        positions_row, positions_round, buckets_row, buckets_round, length, reach, rounds, DROPOUT, OWN,
    )  # fmt: skip
    keys, values = Rows(k + row * k_row, k_step), Rows(v + row * v_row, v_step)
    slot = block.start + tl.arange(0, OWN)
    inside, valid = slot < length, slot < block.count
    position = load_numbers(positions_of_round(block, block.number), slot, inside)
    query = load_rows(Rows(q + row * q_row, q_step), position, valid, D, PAD)
    acc = tl.zeros((OWN, PAD_V), dtype=tl.float32)
    peak = tl.full((OWN,), NOTHING, dtype=tl.float32)
    total = tl.zeros((OWN,), dtype=tl.float32)
    acc, peak, total = attend_to_keys(
        acc, peak, total, query, slot, position, valid, keys, values, scales + row * length, block, history, dropout,
        block.number, ROUNDS, True,
        WINDOW, CAUSAL, EXCLUDES_OWN, ONCE, DROPOUT, UNIT, D, PAD, D_V, PAD_V, OTHER,
    )  # fmt: skip
    met = total > 0.0
    total = tl.where(met, total, 1.0)
    store_rows(
        Rows(partial_out + line * length * D_V, D_V), position, inside & met, acc / total[:, None], D_V, PAD_V
    )
    lse = tl.where(met, peak + tl.log2(total), tl.where(valid, NOTHING, NOT_REAL))
    tl.store(partial_lse + line * length + position, lse, mask=inside)


@triton.jit
def merge_rounds(
    partial_out, partial_lse, v, out, lse, drop_keys, least, kept, length, v_row, v_step,
    ROUNDS: tl.constexpr, OWN_IF_ALONE: tl.constexpr, DROPOUT: tl.constexpr,
    D_V: tl.constexpr, PAD_V: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out and lse of BLOCK positions: the mean of the rounds' outputs, each weighted by 2^partial_lse."""
    row, position, valid = _positions_of_program(length, BLOCK)
    partial_lse += row * ROUNDS * length + position
    peak = tl.load(partial_lse, mask=valid, other=NOT_REAL)
    for number in tl.static_range(1, ROUNDS):
        peak = tl.maximum(peak, tl.load(partial_lse + number * length, mask=valid, other=NOT_REAL))
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    acc = tl.zeros((BLOCK, PAD_V), dtype=tl.float32)
    for number in tl.static_range(ROUNDS):
        round_lse = tl.load(partial_lse + number * length, mask=valid, other=NOT_REAL)
        met = round_lse > NOTHING
        weight = tl.where(met, tl.exp2(round_lse - peak), 0.0)
        total += weight
        round_out = Rows(partial_out + (row * ROUNDS + number) * length * D_V, D_V)
        acc += weight[:, None] * load_rows(round_out, position, met, D_V, PAD_V).to(tl.float32)
    alone = total == 0.0
    total = tl.where(alone, 1.0, total)
    acc = acc / total[:, None]
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


@triton.jit(do_not_specialize=INTEGERS)
def backward_rounds(
    q, k, v, grad, lse, delta, scales, partial_q, partial_k, partial_v,
    positions, buckets, slots, low, high, real_lengths, drop_keys, least, kept,
    positions_row, positions_round, buckets_row, buckets_round, length, reach, rounds,
    q_row, q_step, k_row, k_step, v_row, v_step, grad_row, grad_step,
    ROUNDS: tl.constexpr, WINDOW: tl.constexpr, CAUSAL: tl.constexpr, EXCLUDES_OWN: tl.constexpr,
    ONCE: tl.constexpr, DROPOUT: tl.constexpr, UNIT: tl.constexpr,
    D: tl.constexpr, PAD: tl.constexpr, D_V: tl.constexpr, PAD_V: tl.constexpr,
    OWN: tl.constexpr, OTHER: tl.constexpr,
):  # fmt: skip
    """OWN slots of a round: the round's gradients of k and v at their positions as keys, then of q as queries."""
    block, history, dropout, index, line = _block_of_program(
        positions, buckets, slots, low, high, real_lengths, drop_keys, least, kept,
        positions_row, positions_round, buckets_row, buckets_round, length, reach, rounds, DROPOUT, OWN,
    )  # fmt: skip
    at = index * length
    row = Row(
        Rows(q + index * q_row, q_step), Rows(k + index * k_row, k_step),
        Rows(v + index * v_row, v_step), Rows(grad + index * grad_row, grad_step),
        lse + at, delta + at, scales + at,
    )  # fmt: skip
    partial_q, partial_k = Rows(partial_q + line * length * D, D), Rows(partial_k + line * length * D, D)
    slot = block.start + tl.arange(0, OWN)
    inside, valid = slot < length, slot < block.count
    own_positions = positions_of_round(block, block.number)
    position = load_numbers(own_positions, slot, inside)
    key = load_rows(row.k, position, valid, D, PAD)
    one = tl.full((OWN,), 1.0, dtype=tl.float32)
    scale = tl.load(row.scales + position, mask=valid, other=0.0) if UNIT else one
    value = load_rows(row.v, position, valid, D_V, PAD_V)
    acc_k = tl.zeros((OWN, PAD), dtype=tl.float32)
    acc_v = tl.zeros((OWN, PAD_V), dtype=tl.float32)
    acc_k, acc_v = add_from_queries(
        acc_k, acc_v, key, value, scale, slot, position, valid, row, block, history, dropout,
        block.number, ROUNDS, True, False,
        WINDOW, CAUSAL, EXCLUDES_OWN, ONCE, DROPOUT, UNIT, D, PAD, D_V, PAD_V, OTHER,
    )  # fmt: skip
    position = reload_numbers(own_positions, slot, inside)
    store_rows(Rows(partial_v + line * length * D_V, D_V), position, inside, acc_v, D_V, PAD_V)
    if UNIT:
        acc = gradient_of_unit(acc_k, key, scale)
    else:
        store_rows(partial_k, position, inside, acc_k, D, PAD)
        acc = tl.zeros((OWN, PAD), dtype=tl.float32)
    acc = add_from_keys(
        acc, slot, position, valid, row, block, history, dropout, block.number, ROUNDS, True,
        WINDOW, CAUSAL, EXCLUDES_OWN, ONCE, DROPOUT, UNIT, D, PAD, D_V, PAD_V, OTHER,
    )  # fmt: skip
    position = reload_numbers(own_positions, slot, inside)
    store_rows(partial_q, position, inside, acc, D, PAD)


@triton.jit
def add_rounds(
    partial_q, partial_k, partial_v, grad_q, grad_k, grad_v, grad, lse, drop_keys, least, kept, length,
    q_row, q_step, k_row, k_step, v_row, v_step, grad_row, grad_step,
    ROUNDS: tl.constexpr, OWN_IF_ALONE: tl.constexpr, DROPOUT: tl.constexpr, UNIT: tl.constexpr,
    D: tl.constexpr, PAD: tl.constexpr, D_V: tl.constexpr, PAD_V: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradients of q, k (if not UNIT) and v at BLOCK positions: the sums over the rounds."""
    row, position, valid = _positions_of_program(length, BLOCK)
    acc = _sum(partial_q, row, position, valid, length, ROUNDS, D, PAD, BLOCK)
    store_rows(Rows(grad_q + row * q_row, q_step), position, valid, acc, D, PAD)
    if not UNIT:
        acc = _sum(partial_k, row, position, valid, length, ROUNDS, D, PAD, BLOCK)
        store_rows(Rows(grad_k + row * k_row, k_step), position, valid, acc, D, PAD)
    acc = _sum(partial_v, row, position, valid, length, ROUNDS, D_V, PAD_V, BLOCK)
    if OWN_IF_ALONE:
        # A position that attends to nothing in any round took its own value.
        own_lse = tl.load(lse + row * length + position, mask=valid, other=NOT_REAL)
        alone = (own_lse <= NOTHING) & (own_lse > BETWEEN)
        own_grad = load_rows(Rows(grad + row * grad_row, grad_step), position, alone, D_V, PAD_V).to(
            tl.float32
        )
        if DROPOUT:
            dropout = Dropout(tl.load(drop_keys + row), least, kept)
            own_grad = own_grad * pair_scale(position, position, dropout)[:, None]
        acc += own_grad
    store_rows(Rows(grad_v + row * v_row, v_step), position, valid, acc, D_V, PAD_V)


@triton.jit
def _sum(
    partial, row, position, valid, length,
    ROUNDS: tl.constexpr, WIDTH: tl.constexpr, PAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The sum over the rounds of partial (rows, rounds, length, WIDTH) at positions of a row: fp32 (BLOCK, PAD)."""
    acc = tl.zeros((BLOCK, PAD), dtype=tl.float32)
    for number in tl.static_range(ROUNDS):
        rows = Rows(partial + (row * ROUNDS + number) * length * WIDTH, WIDTH)
        acc += load_rows(rows, position, valid, WIDTH, PAD).to(tl.float32)
    return acc


@triton.jit
def _block_of_program(
    positions, buckets, slots, low, high, real_lengths, drop_keys, least, kept,
    positions_row, positions_round, buckets_row, buckets_round, length, reach, rounds,
    DROPOUT: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    """The program's Block, History and Dropout, its row, and row · rounds + round."""
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
    dropout = Dropout(tl.load(drop_keys + row) if DROPOUT else 0, least, kept)
    return block, history, dropout, row, line.to(tl.int64)


@triton.jit
def _positions_of_program(length, BLOCK: tl.constexpr):
    """The row and the BLOCK positions of a program that combines rounds, and which of them exist.

    The last row comes first: its partial results were written last, and some are still in the cache.
    """
    blocks = tl.cdiv(length, BLOCK)
    row = ((tl.num_programs(0) - 1 - tl.program_id(0)) // blocks).to(tl.int64)
    position = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    return row, position, position < length
