"""The backward pass of all rounds, and the sum of their gradients.

A program makes its slots keys first (the queries that attend to them give the gradients of k and v), then queries
(their keys give the gradient of q). A round's gradients are rounded to the dtype of the tensors and lie at their
positions, like its output (`forward`).
"""

# Device code has no Python types.
# mypy: allow-untyped-defs

from __future__ import annotations

from typing import Any, NamedTuple

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
from megabase.models.attention.kernels.triton.together.forward import (
    BETWEEN,
    NOT_REAL,
    NOTHING,
    positions_of_program,
)
from megabase.models.attention.kernels.triton.together.pairs import (
    block_of_program,
    keys_of,
    pair_counts,
    positions_of_round,
    queries_of,
)


class Row(NamedTuple):
    """Addresses of what one row of the batch holds. q, k, v, grad: Rows. sums: see `pack_sums`. scales: by slot."""

    q: Any
    k: Any
    v: Any
    grad: Any
    sums: Any
    scales: Any


@triton.jit
def pack_sums(
    grad, out, lse, sums, length, grad_row, grad_step, out_row, out_step,
    D_V: tl.constexpr, PAD_V: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """For BLOCK positions, in one integer of 64 bits: the bits of lse, and above them those of delta = Σ grad · out,
    which the gradient of each score of a query subtracts. So one load gives both."""
    blocks = tl.cdiv(length, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    position = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    valid = position < length
    x = load_rows(Rows(grad + row * grad_row, grad_step), position, valid, D_V, PAD_V).to(tl.float32)
    y = load_rows(Rows(out + row * out_row, out_step), position, valid, D_V, PAD_V).to(tl.float32)
    delta = tl.sum(x * y, axis=1).to(tl.int32, bitcast=True).to(tl.int64)
    low = tl.load(lse + row * length + position, mask=valid, other=0.0).to(tl.int32, bitcast=True)
    tl.store(sums + row * length + position, (delta << 32) | (low.to(tl.int64) & 0xFFFFFFFF), mask=valid)


@triton.jit
def _load_sums(sums, position, valid):
    """lse and delta of positions."""
    packed = tl.load(sums + position, mask=valid, other=0)
    lse = packed.to(tl.int32).to(tl.float32, bitcast=True)
    return lse, (packed >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=INTEGERS)
def backward_rounds(
    q, k, v, grad, sums, scales, partial_q, partial_k, partial_v,
    positions, slot_low, slot_high, slots, low, high, real_lengths, drop_keys, least, kept, length, reach, rounds,
    q_row, q_step, k_row, k_step, v_row, v_step, grad_row, grad_step,
    ROUNDS: tl.constexpr, WINDOW: tl.constexpr, CAUSAL: tl.constexpr, EXCLUDES_OWN: tl.constexpr,
    ONCE: tl.constexpr, DROPOUT: tl.constexpr, UNIT: tl.constexpr,
    D: tl.constexpr, PAD: tl.constexpr, D_V: tl.constexpr, PAD_V: tl.constexpr,
    OWN: tl.constexpr, OTHER: tl.constexpr,
):  # fmt: skip
    """OWN slots of a round: the round's gradients of k and v at their positions as keys, then of q as queries."""
    block, history, index, line = block_of_program(
        positions, slot_low, slot_high, slots, low, high, real_lengths, length, reach, rounds, OWN
    )
    dropout = Dropout(tl.load(drop_keys + index) if DROPOUT else 0, least, kept)
    row = Row(
        Rows(q + index * q_row, q_step), Rows(k + index * k_row, k_step),
        Rows(v + index * v_row, v_step), Rows(grad + index * grad_row, grad_step),
        sums + index * length, scales + index * rounds * length,
    )  # fmt: skip
    slot = block.start + tl.arange(0, OWN)
    inside, valid = slot < length, slot < block.count
    position = load_numbers(positions_of_round(block, block.number), slot, inside)
    key = load_rows(row.k, position, valid, D, PAD)
    value = load_rows(row.v, position, valid, D_V, PAD_V)
    one = tl.full((OWN,), 1.0, dtype=tl.float32)
    scale = tl.load(scales + line * length + slot, mask=valid, other=0.0) if UNIT else one
    acc_k, acc_v = _from_queries(
        key, value, scale, slot, position, valid, row, length, block, history, dropout,
        ROUNDS, WINDOW, CAUSAL, EXCLUDES_OWN, ONCE, DROPOUT, UNIT, D, PAD, D_V, PAD_V, OWN, OTHER,
    )  # fmt: skip
    store_rows(Rows(partial_v + line * length * D_V, D_V), position, inside, acc_v, D_V, PAD_V)
    if UNIT:
        # k = c · x, 1 / c² = Σ x² + const: x's gradient is c · dk − c³ · (x · dk) · x.
        x = key.to(tl.float32)
        along = scale * scale * tl.sum(acc_k * x, axis=1)
        acc = scale[:, None] * (acc_k - along[:, None] * x)
    else:
        store_rows(Rows(partial_k + line * length * D, D), position, inside, acc_k, D, PAD)
        acc = tl.zeros((OWN, PAD), dtype=tl.float32)
    acc = _add_from_keys(
        acc, slot, position, valid, row, length, block, history, dropout,
        ROUNDS, WINDOW, CAUSAL, EXCLUDES_OWN, ONCE, DROPOUT, UNIT, D, PAD, D_V, PAD_V, OTHER,
    )  # fmt: skip
    store_rows(Rows(partial_q + line * length * D, D), position, inside, acc, D, PAD)


@triton.jit
def _from_queries(
    own_key, own_value, own_scale, slot, position, valid, row, length, block, history, dropout,
    ROUNDS: tl.constexpr, WINDOW: tl.constexpr, CAUSAL: tl.constexpr, EXCLUDES_OWN: tl.constexpr,
    ONCE: tl.constexpr, DROPOUT: tl.constexpr, UNIT: tl.constexpr,
    D: tl.constexpr, PAD: tl.constexpr, D_V: tl.constexpr, PAD_V: tl.constexpr,
    OWN: tl.constexpr, OTHER: tl.constexpr,
):  # fmt: skip
    """The block's slots as keys: the gradients of keys and values, from the queries that attend to them."""
    acc_k = tl.zeros((OWN, PAD), dtype=tl.float32)
    acc_v = tl.zeros((OWN, PAD_V), dtype=tl.float32)
    factor = (own_scale * LOG2_E)[:, None]
    for RING in tl.static_range(1 if WINDOW else 2):
        partners = queries_of(block, slot, valid, RING, WINDOW, CAUSAL, EXCLUDES_OWN)
        other_positions = positions_of_round(block, partners.number)
        for begin in range(partners.first, partners.last, OTHER):
            other = begin + tl.arange(0, OTHER)
            exists = other < partners.last
            other_position = load_numbers(other_positions, other, exists)
            query = load_rows(row.q, other_position, exists, D, PAD)
            grad = load_rows(row.grad, other_position, exists, D_V, PAD_V)
            lse, delta = _load_sums(row.sums, other_position, exists)
            scores = product(own_key, tl.trans(query)) * factor
            grad_scores = product(own_value, tl.trans(grad))
            counts = pair_counts(
                partners, other, other_position[None, :], position[:, None], partners.number, block, history,
                WINDOW, CAUSAL, EXCLUDES_OWN, ONCE, RING, ROUNDS,
            )  # fmt: skip
            weights = tl.exp2(tl.where(counts, scores - lse[None, :], float("-inf")))
            kept_weights = weights
            if DROPOUT:
                kept = pair_scale(other_position[None, :], position[:, None], dropout)
                kept_weights = weights * kept
                grad_scores = grad_scores * kept
            acc_v = add_product(acc_v, kept_weights.to(grad.dtype), grad)
            grad_scores = weights * (grad_scores - delta[None, :])
            acc_k = add_product(acc_k, grad_scores.to(query.dtype), query)
    return acc_k, acc_v


@triton.jit
def _add_from_keys(
    acc, slot, position, valid, row, length, block, history, dropout,
    ROUNDS: tl.constexpr, WINDOW: tl.constexpr, CAUSAL: tl.constexpr, EXCLUDES_OWN: tl.constexpr,
    ONCE: tl.constexpr, DROPOUT: tl.constexpr, UNIT: tl.constexpr,
    D: tl.constexpr, PAD: tl.constexpr, D_V: tl.constexpr, PAD_V: tl.constexpr, OTHER: tl.constexpr,
):  # fmt: skip
    """The block's slots as queries: the sum acc (the gradient of q) with what their keys add."""
    own_query = load_rows(row.q, position, valid, D, PAD)
    own_grad = load_rows(row.grad, position, valid, D_V, PAD_V)
    own_lse, own_delta = _load_sums(row.sums, position, valid)
    for RING in tl.static_range(1 if WINDOW else 2):
        partners = keys_of(block, slot, valid, RING, WINDOW, CAUSAL, EXCLUDES_OWN)
        other_positions = positions_of_round(block, partners.number)
        other_scales = row.scales + partners.number * length
        for begin in range(partners.first, partners.last, OTHER):
            other = begin + tl.arange(0, OTHER)
            exists = other < partners.last
            other_position = load_numbers(other_positions, other, exists)
            key = load_rows(row.k, other_position, exists, D, PAD)
            value = load_rows(row.v, other_position, exists, D_V, PAD_V)
            scores = product(own_query, tl.trans(key))
            if UNIT:
                scale = tl.load(other_scales + begin + tl.arange(0, OTHER), mask=exists, other=0.0)
                scores *= (scale * LOG2_E)[None, :]
            else:
                scores *= LOG2_E
            grad_scores = product(own_grad, tl.trans(value))
            counts = pair_counts(
                partners, other, position[:, None], other_position[None, :], block.number, block, history,
                WINDOW, CAUSAL, EXCLUDES_OWN, ONCE, RING, ROUNDS,
            )  # fmt: skip
            weights = tl.exp2(tl.where(counts, scores - own_lse[:, None], float("-inf")))
            if DROPOUT:
                grad_scores = grad_scores * pair_scale(position[:, None], other_position[None, :], dropout)
            grad_scores = weights * (grad_scores - own_delta[:, None])
            if UNIT:
                grad_scores *= scale[None, :]
            acc = add_product(acc, grad_scores.to(key.dtype), key)
    return acc


@triton.jit
def add_rounds(
    partial_q, partial_k, partial_v, grad_q, grad_k, grad_v, grad, lse, drop_keys, least, kept, length,
    q_row, q_step, k_row, k_step, v_row, v_step, grad_row, grad_step,
    ROUNDS: tl.constexpr, OWN_IF_ALONE: tl.constexpr, DROPOUT: tl.constexpr, UNIT: tl.constexpr,
    D: tl.constexpr, PAD: tl.constexpr, D_V: tl.constexpr, PAD_V: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradients of q, k (if not UNIT) and v at BLOCK positions: the sums over the rounds."""
    row, position, valid = positions_of_program(length, BLOCK)
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
