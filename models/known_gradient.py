"""An autograd function that computes forward and backward together where the gradient of its result is known already.

That is so where the reversible stack runs a branch again. The forward pass then computes all gradients, a piece at a
time, and the backward pass returns them: no piece is computed twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


class Computation(Protocol):
    """What is computed of some tensors."""

    def forward(self, *tensors: Any) -> Tensor:
        """The result."""
        ...

    def forward_and_backward(self, grad: Tensor, *tensors: Any) -> tuple[Tensor, Sequence[Tensor | None]]:
        """The result, and the gradients of the tensors, given that of the result."""
        ...


def compute(computation: Computation, grad: Tensor | None, *tensors: Tensor | None) -> Tensor:
    """The result of a computation, differentiable with respect to its tensors.

    Args:
        computation: what to compute.
        grad: the gradient that the backward pass will get; None: it is not known yet.
        tensors: what it is computed of; all gradients of a tensor are returned once, summed.
    """
    return _Computed.apply(computation, grad, *tensors)


class _Computed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, computation: Computation, grad: Tensor | None, *tensors: Tensor | None) -> Tensor:
        ctx.computation, ctx.known = computation, grad is not None
        if grad is None:
            ctx.save_for_backward(*tensors)
            return computation.forward(*tensors)
        y, grads = computation.forward_and_backward(grad, *tensors)
        ctx.save_for_backward(*grads)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        if not ctx.known:
            _, saved = ctx.computation.forward_and_backward(grads[0], *saved)
        return None, None, *saved
