"""Sorted attention with all rounds in one launch, as an autograd.Function."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
from torch import Tensor

from megabase.models.attention.kernels.inputs import PairDropout, Rule, SortedOrder
from megabase.models.attention.kernels.triton.launch import (
    PASS_BLOCK,
    Launch,
    named_strides,
    parts,
    pass_grid,
    scales_of_keys,
    strides,
)
from megabase.models.attention.kernels.triton.tiles import BACKWARD, FORWARD, Tiles
from megabase.models.attention.kernels.triton.together.backward import (
    add_rounds,
    backward_rounds,
    pack_sums,
)
from megabase.models.attention.kernels.triton.together.forward import (
    forward_rounds,
    merge_rounds,
)
from megabase.models.attention.kernels.triton.together.tables import Tables
from megabase.models.gpu import FUSED, padded


class SortedAttentionTogether(torch.autograd.Function):
    """`launch.SortedAttention`, with all rounds in one launch. Saves the same tensors, and `Tables` with the order."""

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
            scales = order.key_scales
            if unit and scales is None:
                scales = scales_of_keys(q)
            tables = Tables.of(order, rule, scales if unit else None)
            order = replace(order, positions=tables.positions, key_scales=None)
            for part in parts(q, v, order.positions.shape[1]):
                launch = Launch.of(q[part], v[part], order, rule, dropout, part, unit)
                partial_out, partial_lse = _partial(v, launch), _partial(lse, launch)
                _run(
                    launch,
                    forward_rounds,
                    FORWARD,
                    {"q": q[part], "k": k[part], "v": v[part]},
                    {"partial_out": partial_out, "partial_lse": partial_lse, **tables[part]},
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
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.case = order, tables, rule, dropout, unit
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Launch all rounds, then the sum of their gradients."""
        q, k, v, out, lse = ctx.saved_tensors
        order, tables, rule, dropout, unit = ctx.case
        grad = grads[0] if grads[0].stride(-1) == 1 else grads[0].contiguous()
        grad_q, grad_v = torch.empty_like(q), torch.empty_like(v)
        grad_k = grad_q if unit else torch.empty_like(k)
        with torch.cuda.device_of(q):
            sums = _sums(grad, out, lse)
            for part in parts(q, v, order.positions.shape[1]):
                launch = Launch.of(q[part], v[part], order, rule, dropout, part, unit)
                partial_q, partial_v = _partial(q, launch), _partial(v, launch)
                partials = {
                    "partial_q": partial_q,
                    "partial_k": partial_q if unit else _partial(k, launch),
                    "partial_v": partial_v,
                }
                _run(
                    launch,
                    backward_rounds,
                    BACKWARD,
                    {"q": q[part], "k": k[part], "v": v[part], "grad": grad[part]},
                    {**partials, "sums": sums[part], **tables[part]},
                )
                results = {"q": grad_q[part], "k": grad_k[part], "v": grad_v[part]}
                add_rounds[pass_grid(lse[part])](
                    **partials,
                    **{f"grad_{name}": x for name, x in results.items()},
                    lse=lse[part],
                    **_combining(launch, {"grad": grad[part]}),
                    **named_strides(results),
                    UNIT=unit,
                    **launch.widths,
                )
        return grad_q, None if unit else grad_k, grad_v, None, None, None


def _run(
    launch: Launch,
    kernel: Any,
    table: dict[int, Tiles],
    matrices: dict[str, Tensor],
    others: dict[str, Tensor],
) -> None:
    """Launch a kernel once for all rounds. Arguments like those of `Launch.run`."""
    rows, rounds, length = launch.positions.shape
    tiles = launch.tiles(table)
    slots, low, high = launch.history()
    kernel[(rows * rounds * triton.cdiv(length, tiles.own),)](
        **matrices,
        **others,
        **{"slots": slots, "low": low, "high": high, "real_lengths": launch.real_lengths},
        **launch.dropout_arguments,
        **{"length": length, "reach": launch.reach, "rounds": rounds},
        **named_strides(matrices),
        **launch.constants(tiles),
    )


def _sums(grad: Tensor, out: Tensor, lse: Tensor) -> Tensor:
    """lse and Σ grad · out of each position, as `pack_sums` packs them: (rows, length) int64."""
    sums = torch.empty(lse.shape, dtype=torch.int64, device=lse.device)
    d_v = out.shape[-1]
    pack_sums[pass_grid(lse)](
        *(grad, out, lse, sums, lse.shape[1], *strides(grad), *strides(out)),
        **{"D_V": d_v, "PAD_V": padded(d_v), "BLOCK": PASS_BLOCK, **FUSED},
    )
    return sums


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
