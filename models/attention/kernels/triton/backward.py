"""The backward pass of one round, from the log-sum-exp over all rounds.

One launch for each round does both halves: the block's slots as keys first (the queries that attend to them give the
gradients of k and v), then as queries (their keys give the gradient of q).
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
    begin_sums,
    finish_sums,
    load_numbers,
    load_rows,
    pair_scale,
    product,
    reload_numbers,
)
from megabase.models.attention.kernels.triton.pairs import (
    NO_KEY,
    NO_QUERY,
    Block,
    History,
    Slots,
    column,
    keys_in_reach,
    line,
    load_slots,
    pair_counts,
    positions_of_round,
    queries_in_reach,
)
from megabase.models.attention.kernels.triton.tiles import INTEGERS


class Row(NamedTuple):
    """Addresses of what one row of the batch holds. q, k, v, grad: Rows. lse, delta, scales: one number a position."""

    q: Any
    k: Any
    v: Any
    grad: Any
    lse: Any
    delta: Any
    scales: Any


@triton.jit(do_not_specialize=INTEGERS)
def backward_round(
    q, k, v, grad, lse, delta, scales, grad_q, grad_k, grad_v, partial_q, partial_k, partial_v,
    positions, buckets, slots, low, high, real_lengths, drop_keys, least, kept,
    positions_row, positions_round, buckets_row, buckets_round, length, reach, number, rounds,
    q_row, q_step, k_row, k_step, v_row, v_step, grad_row, grad_step,
    ROUND: tl.constexpr, ROUNDS: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
    WINDOW: tl.constexpr, CAUSAL: tl.constexpr, EXCLUDES_OWN: tl.constexpr, ONCE: tl.constexpr,
    OWN_IF_ALONE: tl.constexpr, DROPOUT: tl.constexpr, UNIT: tl.constexpr,
    D: tl.constexpr, PAD: tl.constexpr, D_V: tl.constexpr, PAD_V: tl.constexpr,
    OWN: tl.constexpr, OTHER: tl.constexpr,
):  # fmt: skip
    """Round `number` for OWN slots: the gradients of k and v at their positions as keys, then of q as queries.

    Long because a kernel's parameters are what `launch.Launch` passes: Triton would compile integers in a tuple into
    the code (do_not_specialize does not reach them), and 3.3 has no tuples of constants.
    """
    blocks = tl.cdiv(length, OWN)
    index = (tl.program_id(0) // blocks).to(tl.int64)
    start = tl.program_id(0) % blocks * OWN
    history_start = index * rounds * length
    history = History(slots + history_start, low + history_start, high + history_start, length)
    count = tl.load(real_lengths + index).to(tl.int32)
    block = Block(
        positions + index * positions_row, positions_round,
        buckets + index * buckets_row + number.to(tl.int64) * buckets_round,
        number, rounds, start, tl.minimum(start + OWN, count), reach, count,
    )  # fmt: skip
    dropout = Dropout(tl.load(drop_keys + index) if DROPOUT else 0, least, kept)
    at = index * length
    row = Row(
        Rows(q + index * q_row, q_step), Rows(k + index * k_row, k_step),
        Rows(v + index * v_row, v_step), Rows(grad + index * grad_row, grad_step),
        lse + at, delta + at, scales + at,
    )  # fmt: skip
    grad_q, partial_q = Rows(grad_q + index * q_row, q_step), Rows(partial_q + at * D, D)
    grad_k, partial_k = Rows(grad_k + index * k_row, k_step), Rows(partial_k + at * D, D)
    grad_v, partial_v = Rows(grad_v + index * v_row, v_step), Rows(partial_v + at * D_V, D_V)

    slot = start + tl.arange(0, OWN)
    inside, valid = slot < length, slot < count
    own_positions = positions_of_round(block, number)
    position = load_numbers(own_positions, slot, inside)
    key = load_rows(row.k, position, valid, D, PAD)
    one = tl.full((OWN,), 1.0, dtype=tl.float32)
    scale = tl.load(row.scales + position, mask=valid, other=0.0) if UNIT else one
    value = load_rows(row.v, position, valid, D_V, PAD_V)
    # UNIT: a key is made of its query, so this round's gradient of the key becomes one of the query, below.
    acc_k = begin_sums(partial_k, position, valid, FIRST or UNIT, OWN, D, PAD)
    acc_v = begin_sums(partial_v, position, valid, FIRST, OWN, D_V, PAD_V)
    acc_k, acc_v = _add_from_queries(
        acc_k, acc_v, key, value, scale, slot, position, valid, row, block, history, dropout,
        ROUND, ROUNDS, FIRST and OWN_IF_ALONE,
        WINDOW, CAUSAL, EXCLUDES_OWN, ONCE, DROPOUT, UNIT, D, PAD, D_V, PAD_V, OTHER,
    )  # fmt: skip
    position = reload_numbers(own_positions, slot, inside)
    finish_sums(partial_v, grad_v, position, inside, acc_v, LAST, D_V, PAD_V)
    if UNIT:
        # k = c · x, 1 / c² = Σ x² + const: x's gradient is c · dk − c³ · (x · dk) · x.
        x = key.to(tl.float32)
        along = scale * scale * tl.sum(acc_k * x, axis=1)
        acc = scale[:, None] * (acc_k - along[:, None] * x)
        acc += begin_sums(partial_q, position, valid, FIRST, OWN, D, PAD)
    else:
        finish_sums(partial_k, grad_k, position, inside, acc_k, LAST, D, PAD)
        acc = begin_sums(partial_q, position, valid, FIRST, OWN, D, PAD)
    acc = _add_from_keys(
        acc, slot, position, valid, row, block, history, dropout,
        ROUND, ROUNDS, WINDOW, CAUSAL, EXCLUDES_OWN, ONCE, DROPOUT, UNIT, D, PAD, D_V, PAD_V, OTHER,
    )  # fmt: skip
    position = reload_numbers(own_positions, slot, inside)
    finish_sums(partial_q, grad_q, position, inside, acc, LAST, D, PAD)


@triton.jit
def _add_from_queries(
    acc_k, acc_v, own_key, own_value, own_scale, slot, position, valid, row, block, history, dropout,
    ROUND: tl.constexpr, ROUNDS: tl.constexpr, ADD_OWN: tl.constexpr, WINDOW: tl.constexpr, CAUSAL: tl.constexpr,
    EXCLUDES_OWN: tl.constexpr, ONCE: tl.constexpr, DROPOUT: tl.constexpr, UNIT: tl.constexpr,
    D: tl.constexpr, PAD: tl.constexpr, D_V: tl.constexpr, PAD_V: tl.constexpr, OTHER: tl.constexpr,
):  # fmt: skip
    """The block's slots as keys: the sums acc_k and acc_v with what the queries that attend to them add."""
    if ADD_OWN:
        # A position that attends to nothing in any round took its own value.
        empty = valid & (tl.load(row.lse + position, mask=valid, other=0.0) < -1e29)
        own_grad = load_rows(row.grad, position, empty, D_V, PAD_V).to(tl.float32)
        if DROPOUT:
            own_grad = own_grad * pair_scale(position, position, dropout)[:, None]
        acc_v += own_grad
    for RING in tl.static_range(1 if WINDOW else 2):
        first, last, label, query_positions = queries_in_reach(
            block, slot, valid, RING, WINDOW, CAUSAL, OTHER
        )
        keys = column(Slots(slot, label, position))
        for begin in range(first, last, OTHER):
            other, other_valid = load_slots(
                block, query_positions, begin, last, 1, NO_QUERY, RING, WINDOW, OTHER
            )
            query = load_rows(row.q, other.position, other_valid, D, PAD)
            grad = load_rows(row.grad, other.position, other_valid, D_V, PAD_V)
            lse = tl.load(row.lse + other.position, mask=other_valid, other=0.0)
            delta = tl.load(row.delta + other.position, mask=other_valid, other=0.0)
            scores = product(own_key, tl.trans(query)) * LOG2_E
            if UNIT:
                scores *= own_scale[:, None]
            grad_scores = product(own_value, tl.trans(grad))
            counts = pair_counts(
                *(line(other), keys, block, history, WINDOW, CAUSAL, EXCLUDES_OWN, ONCE, RING),
                *((ROUND + 1) % ROUNDS if RING else ROUND, ROUNDS),
            )
            weights = tl.exp2(tl.where(counts, scores - lse[None, :], float("-inf")))
            kept_weights = weights
            if DROPOUT:
                factor = pair_scale(other.position[None, :], position[:, None], dropout)
                kept_weights = weights * factor
                grad_scores = grad_scores * factor
            acc_v = add_product(acc_v, kept_weights.to(grad.dtype), grad)
            grad_scores = weights * (grad_scores - delta[None, :])
            acc_k = add_product(acc_k, grad_scores.to(query.dtype), query)
    return acc_k, acc_v


@triton.jit
def _add_from_keys(
    acc, slot, position, valid, row, block, history, dropout,
    ROUND: tl.constexpr, ROUNDS: tl.constexpr, WINDOW: tl.constexpr, CAUSAL: tl.constexpr, EXCLUDES_OWN: tl.constexpr,
    ONCE: tl.constexpr, DROPOUT: tl.constexpr, UNIT: tl.constexpr,
    D: tl.constexpr, PAD: tl.constexpr, D_V: tl.constexpr, PAD_V: tl.constexpr, OTHER: tl.constexpr,
):  # fmt: skip
    """The block's slots as queries: the sum acc (the gradient of q) with what their keys add."""
    own_query = load_rows(row.q, position, valid, D, PAD)
    own_grad = load_rows(row.grad, position, valid, D_V, PAD_V)
    own_lse = tl.load(row.lse + position, mask=valid, other=0.0)
    own_delta = tl.load(row.delta + position, mask=valid, other=0.0)
    for RING in tl.static_range(1 if WINDOW else 2):
        first, last, label, key_positions = keys_in_reach(block, slot, valid, RING, WINDOW, CAUSAL, OTHER)
        queries = column(Slots(slot, label, position))
        for begin in range(first, last, OTHER):
            other, other_valid = load_slots(block, key_positions, begin, last, 0, NO_KEY, RING, WINDOW, OTHER)
            key = load_rows(row.k, other.position, other_valid, D, PAD)
            value = load_rows(row.v, other.position, other_valid, D_V, PAD_V)
            scores = product(own_query, tl.trans(key)) * LOG2_E
            if UNIT:
                scale = tl.load(row.scales + other.position, mask=other_valid, other=0.0)
                scores *= scale[None, :]
            grad_scores = product(own_grad, tl.trans(value))
            counts = pair_counts(
                queries, line(other), block, history, WINDOW, CAUSAL, EXCLUDES_OWN, ONCE, RING, ROUND, ROUNDS
            )
            weights = tl.exp2(tl.where(counts, scores - own_lse[:, None], float("-inf")))
            if DROPOUT:
                grad_scores = grad_scores * pair_scale(position[:, None], other.position[None, :], dropout)
            grad_scores = weights * (grad_scores - own_delta[:, None])
            if UNIT:
                grad_scores *= scale[None, :]
            acc = add_product(acc, grad_scores.to(key.dtype), key)
    return acc


@triton.jit
def output_deltas(
    grad, out, delta, length, grad_row, grad_step, out_row, out_step,
    D_V: tl.constexpr, PAD_V: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """delta = Σ grad · out for BLOCK positions: the gradient of each score of a query subtracts it."""
    blocks = tl.cdiv(length, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    position = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    valid = position < length
    x = load_rows(Rows(grad + row * grad_row, grad_step), position, valid, D_V, PAD_V).to(tl.float32)
    y = load_rows(Rows(out + row * out_row, out_step), position, valid, D_V, PAD_V).to(tl.float32)
    tl.store(delta + row * length + position, tl.sum(x * y, axis=1), mask=valid)
