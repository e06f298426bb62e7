"""Gradients of a model, and the tensors that it keeps for backward; benchmarks/exactness.py uses this too."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter's gradient. Clears the gradients."""
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert len(found) == len(list(model.parameters()))
    model.zero_grad()
    return found


def assert_same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different


def kept_for_backward(model: nn.Module, forward: Callable[[], object]) -> list[Tensor]:
    """The tensors that stay in memory between forward and backward pass, each once, without the parameters."""
    parameters = {p.data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}
    alive: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        alive.append(x)  # so that no address is reused
        if x.data_ptr() not in parameters:
            kept[x.data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        forward()
    return list(kept.values())
