"""Attention of a very long sequence, some heads at a time.

Between the projections of a layer there are queries, keys, values, the output and the gradients of all of them: some
fourteen numbers for each position and channel. Heads do not depend on each other. So one autograd.Function projects,
attends and projects back for a group of heads, and adds the group's part to the output, before the next group begins.

Where the reversible stack runs a branch again, forward and backward pass of a group run together (known_gradient.py).
Every weight's gradient is returned once, summed: ZeRO 2 and 3 need that.

The output is a sum over groups, each rounded to the dtype that is computed in. So it differs from that of all heads at
once by rounding. The number of groups depends on the shapes alone, never on free memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from megabase.models.call import Call
from megabase.models.config import ReformerConfig
from megabase.models.device import slices
from megabase.models.known_gradient import compute
from megabase.models.layers import Linear, ValuesAhead, linear
from megabase.models.precision import Precision
from megabase.models.streams import in_host_memory, moved

LIMIT = {"cpu": 1 << 22, "cuda": 1 << 28}
"""Numbers (positions · heads · width) of the queries of one group, by device type."""

ROWS = {"cpu": 1 << 14, "cuda": 1 << 17}
"""Positions that a projection computes at a time, by device type; on a GPU enough to be worth a launch."""


class Layer(Protocol):
    """What is needed of an AttentionLayer (heads.py)."""

    config: ReformerConfig
    value: Linear
    output: Linear
    ahead: ValuesAhead | None

    @property
    def OF_NEAR(self) -> tuple[str, ...]: ...

    @property
    def in_groups(self) -> bool: ...

    def mix(self, projected: Sequence[Tensor], shares: Tensor | None, call: Call) -> Tensor: ...


@dataclass(frozen=True)
class HeadGroup:
    """Heads that are computed together.

    Attributes:
        of_process: those that this process attends with.
        projected: the numbers of those that it projects, (n,) int64: as many for each process that holds a part of
            the sequence. None: all.
    """

    of_process: slice
    projected: Tensor | None


def head_groups(layer: Layer, x: Tensor, call: Call) -> list[HeadGroup]:
    """The groups of heads that a layer computes one after the other for x (batch, length, dim); often one.

    Layers whose weights are not those of plain linear maps, such as Linformer's, are computed all heads at once.
    """
    heads, size = layer.config.heads, 1 if call.part is None else call.part.size
    if heads % size:  # only layers that exchange no heads can run
        return [HeadGroup(slice(None), None)]
    own = slice(0, heads) if call.part is None else call.part.heads(heads)
    each = own.stop - own.start
    numbers = x.shape[0] * x.shape[1] * heads * layer.config.width
    least = min(each, -(-numbers // _of_device(LIMIT, x.device)))
    count = next(n for n in range(max(1, least), each + 1) if each % n == 0)
    if count == 1 or not layer.in_groups:
        return [HeadGroup(own, None)]
    table = torch.arange(heads).view(size, each)
    return [
        HeadGroup(slice(own.start + part.start, own.start + part.stop), table[:, part].flatten())
        for part in slices(each, each // count)
    ]


def attend_by_heads(layer: Layer, x: Tensor, near: Tensor, call: Call, groups: Sequence[HeadGroup]) -> Tensor:
    """Attention of all positions, (batch, length, dim), one group of heads after the other.

    Args:
        layer: whose projections and `mix` are used.
        x, near, call: as in AttentionLayer.forward.
        groups: of all heads.
    """
    maps = [*(getattr(layer, name) for name in layer.OF_NEAR), layer.value, layer.output]
    shares = None if layer.ahead is None else layer.ahead.weight
    plan, grad = _Plan(layer, replace(call, grad=None), groups, Precision.current(x.device)), call.grad
    if grad is not None and in_host_memory(grad, x.device):  # every group needs it
        grad = moved(grad, x.device, plan.precision.compute_dtype(x.dtype))
    return compute(plan, grad, x, near, shares, *(each.weight for each in maps))


@dataclass(frozen=True)
class _Plan:
    """Computes the groups of a layer. The argument `weights`: of the projections, and last that of the output."""

    layer: Layer
    call: Call
    groups: Sequence[HeadGroup]
    precision: Precision

    @torch.no_grad()
    def forward(self, x: Tensor, near: Tensor, shares: Tensor | None, *weights: Tensor) -> Tensor:
        """The output (batch, length, dim)."""
        y = self._zeros(x, weights)
        for group in self.groups:
            own = _GroupWeights.of(group, self.layer, y.dtype, shares, weights)
            projected = [own.project(number, each) for number, each in enumerate(self._inputs(x, near))]
            with self.precision.restored():
                mixed = self.layer.mix(projected, own.shares, replace(self.call, heads=group.of_process))
            del projected
            _add_products(y, mixed, own.weights[-1])
        return y

    @torch.no_grad()
    def forward_and_backward(
        self, grad: Tensor, x: Tensor, near: Tensor, shares: Tensor | None, *weights: Tensor
    ) -> tuple[Tensor, list[Tensor | None]]:
        """The output, and the gradients of x, near, shares and the weights, given the output's gradient."""
        y, sums = self._zeros(x, weights), _Sums.zeros(x, near, shares, weights)
        of_inputs = self._inputs(sums.x, sums.near)
        for group in self.groups:
            own = _GroupWeights.of(group, self.layer, y.dtype, shares, weights)
            projected = [
                own.project(number, each).requires_grad_()
                for number, each in enumerate(self._inputs(x, near))
            ]
            with torch.enable_grad(), self.precision.restored():
                mixed = self.layer.mix(projected, own.shares, replace(self.call, heads=group.of_process))
            _add_products(y, mixed.detach(), own.weights[-1])
            grad_mixed = own.add_output_gradients(sums.weights[-1], mixed.detach(), grad)
            leaves = projected if own.shares is None else [*projected, own.shares]
            edge = get_gradient_edge(mixed)
            with torch.autocast(x.device.type, enabled=False):  # as in any backward pass
                found = list(torch.autograd.grad(edge, leaves, grad_mixed))
            del mixed, grad_mixed, projected, leaves
            if own.shares is not None and sums.shares is not None:
                sums.shares.view(2, -1)[:, own.heads] += found.pop().view(2, -1)
            for number, (given, total) in enumerate(zip(self._inputs(x, near), of_inputs, strict=True)):
                own.add_input_gradients(number, sums.weights[number], total, given, found[number])
        return y, sums.as_gradients_of(shares, weights)

    def _inputs(self, x: Tensor, near: Tensor) -> list[Tensor]:
        """What each projection reads."""
        return [near] * len(self.layer.OF_NEAR) + [x]

    def _zeros(self, x: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """Zeros for the output (batch, length, dim), in the dtype that is computed in."""
        dtype = self.precision.compute_dtype(x.dtype)
        return torch.zeros(*x.shape[:-1], weights[-1].shape[0], dtype=dtype, device=x.device)


@dataclass(frozen=True)
class _Sums:
    """The gradients so far, of weights in fp32."""

    x: Tensor
    near: Tensor
    shares: Tensor | None
    weights: list[Tensor]

    @classmethod
    def zeros(cls, x: Tensor, near: Tensor, shares: Tensor | None, weights: Sequence[Tensor]) -> _Sums:
        wide = torch.promote_types(weights[0].dtype, torch.float32)
        # Contiguous, as what is added to in pieces must be.
        return cls(
            _zeros(x, x.dtype),
            _zeros(near, near.dtype),
            None if shares is None else _zeros(shares, wide),
            [_zeros(weight, wide) for weight in weights],
        )

    def as_gradients_of(self, shares: Tensor | None, weights: Sequence[Tensor]) -> list[Tensor | None]:
        """In the dtypes of what they are gradients of."""
        of_shares = None if shares is None or self.shares is None else self.shares.to(shares.dtype)
        of_weights = [total.to(weight.dtype) for total, weight in zip(self.weights, weights, strict=True)]
        return [self.x, self.near, of_shares, *of_weights]


@dataclass(frozen=True)
class _GroupWeights:
    """The weights of a group of heads, in the dtype that is computed in.

    Attributes:
        heads: their numbers, (n,) int64.
        channels: the channels of the projections that are theirs, (n · d,) int64.
        weights: (n · d, dim) of each projection, then (dim, n · d) of the output.
        shares: (2 · n,), of ValuesAhead; a leaf.
    """

    heads: Tensor
    channels: Tensor
    weights: list[Tensor]
    shares: Tensor | None

    @classmethod
    def of(
        cls,
        group: HeadGroup,
        layer: Layer,
        dtype: torch.dtype,
        shares: Tensor | None,
        weights: Sequence[Tensor],
    ) -> _GroupWeights:
        device, d = weights[0].device, layer.config.width
        assert group.projected is not None
        heads = group.projected.to(device)
        channels = (heads[:, None] * d + torch.arange(d, device=device)).flatten()
        *projections, output = weights
        chosen = [weight.detach()[channels].to(dtype) for weight in projections]
        own = None
        if shares is not None:
            own = shares.detach().view(2, -1)[:, heads].flatten().requires_grad_()
        return cls(heads, channels, [*chosen, output.detach()[:, channels].to(dtype)], own)

    def project(self, number: int, x: Tensor) -> Tensor:
        """Projection `number` of x (batch, length, dim): (batch, length, n · d)."""
        weight = self.weights[number]
        result = x.new_empty(*x.shape[:-1], weight.shape[0], dtype=weight.dtype)
        with torch.autocast(x.device.type, enabled=False):
            for rows, into in _pieces(x, result):
                into.copy_(linear(rows.to(weight.dtype), weight))
        return result

    def add_output_gradients(self, total: Tensor, mixed: Tensor, grad: Tensor) -> Tensor:
        """Add the gradient of the output's weight to `total`.

        Args:
            total: (dim, heads · d), of all heads.
            mixed: (batch, length, n · d), what the output projection reads.
            grad: (batch, length, dim), the gradient of the output.

        Returns:
            The gradient of `mixed`.
        """
        weight, result = self.weights[-1], mixed.new_empty(mixed.shape)
        own = torch.zeros_like(weight, dtype=total.dtype)
        with torch.autocast(grad.device.type, enabled=False):
            for of_output, rows, into in _pieces(grad, mixed, result):
                of_output = of_output.to(weight.dtype)
                into.copy_(linear(of_output, weight.T))
                own += linear(of_output.T, rows.to(weight.dtype).T)
        total[:, self.channels] += own
        return result

    def add_input_gradients(self, number: int, total: Tensor, of_x: Tensor, x: Tensor, grad: Tensor) -> None:
        """Add the gradients of projection `number`.

        Args:
            number: of the projection.
            total: (heads · d, dim), to which that of the weight is added.
            of_x: (batch, length, dim), to which that of x is added.
            x: (batch, length, dim).
            grad: (batch, length, n · d), the gradient of the projection.
        """
        weight = self.weights[number]
        own = torch.zeros_like(weight, dtype=total.dtype)
        with torch.autocast(x.device.type, enabled=False):
            for of_projected, rows, into in _pieces(grad, x, of_x):
                of_projected = of_projected.to(weight.dtype)
                into += linear(of_projected, weight.T)
                own += linear(of_projected.T, rows.to(weight.dtype).T)
        total[self.channels] += own


def _add_products(y: Tensor, mixed: Tensor, weight: Tensor) -> None:
    """y (batch, length, dim) += mixed (batch, length, n · d) · weightᵀ (dim, n · d)."""
    with torch.autocast(y.device.type, enabled=False):
        for into, rows in _pieces(y, mixed):
            into += linear(rows.to(weight.dtype), weight)


def _of_device(table: dict[str, int], device: torch.device) -> int:
    """The number for a device; for one that is not in the table, that of a CPU."""
    return table.get(device.type, table["cpu"])


def _zeros(like: Tensor, dtype: torch.dtype) -> Tensor:
    """Contiguous zeros of this shape."""
    return torch.zeros(like.shape, dtype=dtype, device=like.device)


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors (batch, length, ...) as pieces (positions, ...) of the same positions: views of contiguous ones."""
    flat = [each.reshape(-1, each.shape[-1]) for each in tensors]
    for part in slices(flat[0].shape[0], _of_device(ROWS, flat[0].device)):
        yield tuple(each[part] for each in flat)
