"""Sorted attention on a GPU as an autograd.Function: which kernels are launched, and with which arguments.

What is special:
- Nothing is sorted but positions. A program takes a block of slots of one round, looks up the positions in them, and
  gathers their rows of q, k, v by address. The rounds are launched one after the other. A position has one slot in a
  round, so one program alone writes to it: the program reads the sums that earlier rounds left there, adds to them, and
  writes them back. So there are no atomics, and one order of summation: the same input gives the same bits.
- The merge of rounds is the online softmax itself (`forward`).
- The backward pass starts from the log-sum-exp over all rounds (`backward`).
- Which keys a query attends to follows from the slots and their buckets (`pairs`). Keys beyond the border of a bucket
  are not loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import triton
from torch import Tensor

from megabase.models.attention.kernels.inputs import PairDropout, Rule, SortedOrder
from megabase.models.attention.kernels.triton.backward import backward_round, output_deltas
from megabase.models.attention.kernels.triton.forward import forward_round, unit_scales
from megabase.models.attention.kernels.triton.history import fill_history
from megabase.models.attention.kernels.triton.tiles import BACKWARD, FORWARD, SINGLE, Tiles
from megabase.models.gpu import FUSED, padded

PART = 1 << 28
"""The most elements (1 GiB of fp32) of one tensor of partial sums. Rows beyond that are computed later."""

PASS_BLOCK = 64
"""Positions of a program that goes over them once."""


class SortedAttention(torch.autograd.Function):
    """`host.sorted_attention`, differentiable. Saves q, k, v, out and one or two numbers for each position."""

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
        """Launch the rounds of the forward pass."""
        unit, k = k is None, q if k is None else k
        out = torch.empty_like(v)
        lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
        with torch.cuda.device_of(q):
            scales = scales_of_keys(q) if unit else lse
            for part in parts(q, v):
                launch = Launch.of(q[part], v[part], order, rule, dropout, part, unit)
                launch.run(
                    forward_round,
                    FORWARD,
                    {"q": q[part], "k": k[part], "v": v[part]},
                    {
                        "out": out[part],
                        "partial_out": launch.partial(v),
                        "lse": lse[part],
                        "scales": scales[part],
                    },
                )
        ctx.save_for_backward(q, k, v, out, lse, scales)
        ctx.case = order, rule, dropout, unit
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Launch the rounds of the backward pass."""
        q, k, v, out, lse, scales = ctx.saved_tensors
        order, rule, dropout, unit = ctx.case
        grad = grads[0] if grads[0].stride(-1) == 1 else grads[0].contiguous()
        grad_q, grad_v = torch.empty_like(q), torch.empty_like(v)
        grad_k = grad_q if unit else torch.empty_like(k)
        with torch.cuda.device_of(q):
            delta = deltas_of(grad, out)
            for part in parts(q, v):
                launch = Launch.of(q[part], v[part], order, rule, dropout, part, unit)
                partial_q = launch.partial(q)
                launch.run(
                    backward_round,
                    BACKWARD,
                    {"q": q[part], "k": k[part], "v": v[part], "grad": grad[part]},
                    {
                        **{"lse": lse[part], "delta": delta[part], "scales": scales[part]},
                        **{"grad_q": grad_q[part], "grad_k": grad_k[part], "grad_v": grad_v[part]},
                        "partial_q": partial_q,
                        "partial_k": partial_q if unit else launch.partial(k),
                        "partial_v": launch.partial(v),
                    },
                )
        return grad_q, None if unit else grad_k, grad_v, None, None, None


@dataclass(frozen=True)
class Launch:
    """What the launches for all rounds of some rows share: the one place that makes a kernel's arguments.

    Attributes:
        positions: (rows, rounds, length), of `SortedOrder`.
        buckets: The same.
        real_lengths: (rows,), the same.
        rule: Which keys a query attends to.
        dropout: Dropout of attention weights; its keys are those of these rows.
        d: Width of q and k.
        d_v: Width of v.
        single: Whether an operand is fp32.
        unit: Whether keys are the queries scaled to unit length.
    """

    positions: Tensor
    buckets: Tensor
    real_lengths: Tensor
    rule: Rule
    dropout: PairDropout | None
    d: int
    d_v: int
    single: bool
    unit: bool

    @classmethod
    def of(
        cls,
        q: Tensor,
        v: Tensor,
        order: SortedOrder,
        rule: Rule,
        dropout: PairDropout | None,
        part: slice,
        unit: bool,
    ) -> Launch:
        """The launches for the rows `part`, whose queries and values are q and v."""
        tables = (order.positions[part], order.buckets[part])
        positions, buckets = (x if x.stride(-1) == 1 else x.contiguous() for x in tables)
        return cls(
            positions=positions,
            buckets=buckets,
            real_lengths=order.real_lengths[part],
            rule=rule,
            dropout=None if dropout is None else PairDropout(dropout.rate, dropout.keys[part]),
            d=q.shape[-1],
            d_v=v.shape[-1],
            single=torch.float32 in (q.dtype, v.dtype),
            unit=unit,
        )

    @property
    def reach(self) -> int:
        """The rule's reach; a longer one than the sequence changes nothing."""
        return min(self.rule.reach, self.positions.shape[2])

    def run(
        self, kernel: Any, table: dict[int, Tiles], matrices: dict[str, Tensor], others: dict[str, Tensor]
    ) -> None:
        """Launch a kernel for every round, one after the other.

        Args:
            kernel: `forward_round` or `backward_round`.
            table: The tiles of the kernel, by width.
            matrices: Arguments (rows, length, width) by name, whose strides are passed too.
            others: Other tensors by name.
        """
        rows, rounds, length = self.positions.shape
        tiles = self.tiles(table)
        grid = (rows * triton.cdiv(length, tiles.own),)
        for number in range(rounds):
            kernel[grid](
                **matrices,
                **others,
                **self.shared_arguments,
                number=number,
                **named_strides(matrices),
                **self.round_constants(number),
                **self.constants(tiles),
            )

    def tiles(self, table: dict[int, Tiles]) -> Tiles:
        """The kernel's tiles for these widths, dtypes and this rule."""
        tiles = (SINGLE if self.single else table)[max(padded(self.d), padded(self.d_v))]
        plain = self.rule.attend == "window" and not self.rule.once and self.dropout is None
        if table is BACKWARD and not plain:
            # The other rules need more registers: a limit would spill them to memory.
            tiles = tiles._replace(registers=None)
        return tiles

    def partial(self, x: Tensor) -> Tensor:
        """Memory for the sums of x that a round leaves to the next: fp32 (rows, length, d); empty for one round."""
        rows, rounds, _ = self.positions.shape
        shape = (rows, *x.shape[1:]) if rounds > 1 else (0,)
        return torch.empty(shape, dtype=torch.float32, device=x.device)

    @cached_property
    def shared_arguments(self) -> dict[str, Any]:
        """The arguments that both kernels take in every round: the sorted order, the history and dropout."""
        slots, low, high = self.history()
        return {
            "positions": self.positions,
            "buckets": self.buckets,
            "slots": slots,
            "low": low,
            "high": high,
            "real_lengths": self.real_lengths,
            **self.dropout_arguments,
            **self.table_strides,
            "length": self.positions.shape[2],
            "reach": self.reach,
            "rounds": self.positions.shape[1],
        }

    @property
    def dropout_arguments(self) -> dict[str, Any]:
        """The rows' keys of dropout, and what follows from its rate."""
        rate = 0.0 if self.dropout is None else self.dropout.rate
        return {
            "drop_keys": self.real_lengths if self.dropout is None else self.dropout.keys,
            "least": min(round(rate * 2.0**32) - (1 << 31), (1 << 31) - 1),
            "kept": 1.0 / (1.0 - rate),
        }

    @property
    def table_strides(self) -> dict[str, int]:
        """Strides of positions and buckets."""
        return {
            "positions_row": self.positions.stride(0),
            "positions_round": self.positions.stride(1),
            "buckets_row": self.buckets.stride(0),
            "buckets_round": self.buckets.stride(1),
        }

    def history(self) -> tuple[Tensor, Tensor, Tensor]:
        """For the rule `once`, by position: the slot, and the slots [low, high) that it attends to.

        Each (rows, rounds, length) int32. An end that follows from the slot has no table: both ends with the rule
        `chunk`, the upper end if causal.
        """
        if not self.rule.once:
            return self.positions, self.positions, self.positions
        rows, rounds, length = self.positions.shape
        window = self.rule.attend == "window"
        n_tables = (2 if self.rule.causal else 3) if window else 1
        tables = torch.empty(n_tables, *self.positions.shape, dtype=torch.int32, device=self.positions.device)
        slots, low, high = tables[0], tables[min(1, n_tables - 1)], tables[n_tables - 1]
        fill_history[(rows * rounds * triton.cdiv(length, 256),)](
            *(self.positions, self.buckets, slots, low, high, self.real_lengths),
            **self.table_strides,
            **{"length": length, "reach": self.reach, "rounds": rounds, "steps": self.reach.bit_length()},
            **{"N_TABLES": n_tables, "BLOCK": 256, **FUSED},
        )
        return slots, low, high

    def round_constants(self, number: int) -> dict[str, Any]:
        """What is compiled in for one round. ROUND is 0 unless the code depends on it (`once`)."""
        rounds = self.positions.shape[1]
        return {
            "ROUND": number if self.rule.once else 0,
            "FIRST": number == 0,
            "LAST": number == rounds - 1,
            "OWN_IF_ALONE": self.rule.own == "alone",
        }

    def constants(self, tiles: Tiles) -> dict[str, Any]:
        """What is compiled in for every round. ROUNDS is 1 unless the code depends on it (`once`)."""
        return {
            "ROUNDS": self.positions.shape[1] if self.rule.once else 1,
            "WINDOW": self.rule.attend == "window",
            "CAUSAL": self.rule.causal,
            "EXCLUDES_OWN": self.rule.excludes_own,
            "ONCE": self.rule.once,
            "DROPOUT": self.dropout is not None,
            "UNIT": self.unit,
            **self.widths,
            "OWN": tiles.own,
            "OTHER": tiles.other,
            "num_warps": tiles.warps,
            "num_stages": tiles.stages,
            "maxnreg": tiles.registers,
            **FUSED,
        }

    @property
    def widths(self) -> dict[str, int]:
        """Widths of q and v, and of their tiles."""
        return {"D": self.d, "PAD": padded(self.d), "D_V": self.d_v, "PAD_V": padded(self.d_v)}


def scales_of_keys(q: Tensor) -> Tensor:
    """The factors that make unit keys of queries (rows, length, d): (rows, length) fp32."""
    scales = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    unit_scales[pass_grid(scales)](
        *(q, scales, q.shape[1], *strides(q)),
        **{"D": q.shape[-1], "PAD": padded(q.shape[-1]), "BLOCK": PASS_BLOCK, **FUSED},
    )
    return scales


def deltas_of(grad: Tensor, out: Tensor) -> Tensor:
    """Σ grad · out of each position: (rows, length) fp32."""
    delta = torch.empty(out.shape[:2], dtype=torch.float32, device=out.device)
    output_deltas[pass_grid(delta)](
        *(grad, out, delta, out.shape[1], *strides(grad), *strides(out)),
        **{"D_V": out.shape[-1], "PAD_V": padded(out.shape[-1]), "BLOCK": PASS_BLOCK, **FUSED},
    )
    return delta


def named_strides(matrices: dict[str, Tensor]) -> dict[str, int]:
    """Strides of rows and positions: NAME_row and NAME_step."""
    found = {}
    for name, x in matrices.items():
        found[f"{name}_row"], found[f"{name}_step"] = strides(x)
    return found


def parts(q: Tensor, v: Tensor, rounds: int = 1) -> Iterator[slice]:
    """Slices of the rows: those of one slice are computed together. rounds: how many have partial sums of their own."""
    rows, length, d = q.shape
    step = max(1, PART // (rounds * length * max(d, v.shape[-1])))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def pass_grid(numbers: Tensor) -> tuple[int]:
    """Programs that go over the positions of all rows: numbers (rows, length)."""
    return (numbers.shape[0] * triton.cdiv(numbers.shape[1], PASS_BLOCK),)


def strides(x: Tensor) -> tuple[int, int]:
    """Elements from one row of the batch to the next, and from one position to the next."""
    return x.stride(0), x.stride(1)
