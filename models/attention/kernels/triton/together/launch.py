"""Sorted attention with all rounds in one launch, as an autograd.Function."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from megabase.models.attention.kernels.inputs import PairDropout, Rule, SortedOrder
from megabase.models.attention.kernels.triton.launch import (
    PASS_BLOCK,
    Launch,
    deltas_of,
    named_strides,
    parts,
    pass_grid,
    scales_of_keys,
)
from megabase.models.attention.kernels.triton.tiles import BACKWARD, FORWARD
from megabase.models.attention.kernels.triton.together.backward import add_rounds, backward_rounds
from megabase.models.attention.kernels.triton.together.forward import (
    forward_rounds,
    merge_rounds,
    sort_scales,
)
from megabase.models.gpu import FUSED

SLOTS = 512
"""Slots of a program that sorts scales."""


class SortedAttentionTogether(torch.autograd.Function):
    """`launch.SortedAttention`, with all rounds in one launch. Saves the same tensors."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor | None,
        v: Tensor,
        order: SortedOrder,
        rule: Rule,
        dropout: PairDropout | None,
    ) -> Tensor:
        """Launch all rounds, then their merge."""
        unit, k = k is None, q if k is None else k
        out = torch.empty_like(v)
        lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
        with torch.cuda.device_of(q):
            scales = _scales_by_slot(q, order) if unit else lse
            for part in parts(q, v, order.positions.shape[1]):
                launch = Launch.of(q[part], v[part], order, rule, dropout, part, unit)
                partial_out, partial_lse = _partial(v, launch), _partial(lse, launch)
                launch.run_together(
                    forward_rounds,
                    FORWARD,
                    {"q": q[part], "k": k[part], "v": v[part]},
                    {"partial_out": partial_out, "partial_lse": partial_lse, "scales": scales[part]},
                )
                merge_rounds[pass_grid(lse[part])](
                    partial_out=partial_out,
                    partial_lse=partial_lse,
                    out=out[part],
                    lse=lse[part],
                    **_combining(launch, {"v": v[part]}),
                    D_V=launch.widths["D_V"],
                    PAD_V=launch.widths["PAD_V"],
                )
        ctx.save_for_backward(q, k, v, out, lse, scales)
        ctx.case = order, rule, dropout, unit
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Launch all rounds, then the sum of their gradients."""
        q, k, v, out, lse, scales = ctx.saved_tensors
        order, rule, dropout, unit = ctx.case
        grad = grads[0] if grads[0].stride(-1) == 1 else grads[0].contiguous()
        grad_q, grad_v = torch.empty_like(q), torch.empty_like(v)
        grad_k = grad_q if unit else torch.empty_like(k)
        with torch.cuda.device_of(q):
            delta = deltas_of(grad, out)
            for part in parts(q, v, order.positions.shape[1]):
                launch = Launch.of(q[part], v[part], order, rule, dropout, part, unit)
                partial_q, partial_v = _partial(q, launch), _partial(v, launch)
                sums = {
                    "partial_q": partial_q,
                    "partial_k": partial_q if unit else _partial(k, launch),
                    "partial_v": partial_v,
                }
                launch.run_together(
                    backward_rounds,
                    BACKWARD,
                    {"q": q[part], "k": k[part], "v": v[part], "grad": grad[part]},
                    {**sums, "lse": lse[part], "delta": delta[part], "scales": scales[part]},
                )
                results = {"q": grad_q[part], "k": grad_k[part], "v": grad_v[part]}
                add_rounds[pass_grid(lse[part])](
                    **sums,
                    **{f"grad_{name}": x for name, x in results.items()},
                    lse=lse[part],
                    **_combining(launch, {"grad": grad[part]}),
                    **named_strides(results),
                    UNIT=unit,
                    **launch.widths,
                )
        return grad_q, None if unit else grad_k, grad_v, None, None, None


def _scales_by_slot(q: Tensor, order: SortedOrder) -> Tensor:
    """`SortedOrder.key_scales`, computed if the order does not have them."""
    return by_slot(order.positions, scales_of_keys(q))[1] if order.key_scales is None else order.key_scales


def by_slot(positions: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """The tables of `SortedOrder` that follow the sort, in one launch.

    Args:
        positions: (rows, rounds, length) of any integer type, by slot.
        scales: (rows, length) fp32, by position.

    Returns:
        The positions in int32, and `key_scales`.
    """
    positions = positions.contiguous()
    rows, rounds, length = positions.shape
    narrow = positions.dtype != torch.int32
    narrowed = torch.empty_like(positions, dtype=torch.int32) if narrow else positions
    slot_scales = torch.empty(positions.shape, dtype=torch.float32, device=positions.device)
    with torch.cuda.device_of(positions):
        sort_scales[(rows * rounds * triton.cdiv(length, SLOTS),)](
            *(positions, scales, narrowed, slot_scales, length, rounds),
            **{"NARROW": narrow, "BLOCK": SLOTS, **FUSED},
        )
    return narrowed, slot_scales


def _partial(x: Tensor, launch: Launch) -> Tensor:
    """Memory for the partial results of x (rows, length, ...) in every round: (rows, rounds, length, ...)."""
    return torch.empty((*launch.positions.shape, *x.shape[2:]), dtype=x.dtype, device=x.device)


def _combining(launch: Launch, matrices: dict[str, Tensor]) -> dict[str, Any]:
    """The arguments that both kernels that combine rounds take, with one matrix and its strides."""
    _, rounds, length = launch.positions.shape
    return {
        **matrices,
        **named_strides(matrices),
        **launch.dropout_arguments,
        "length": length,
        "ROUNDS": rounds,
        "OWN_IF_ALONE": launch.rule.own == "alone",
        "DROPOUT": launch.dropout is not None,
        "BLOCK": PASS_BLOCK,
        **FUSED,
    }
