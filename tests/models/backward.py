"""Gradients of a model, and the tensors that it keeps for backward; benchmarks/exactness.py uses this too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from megabase.models.streams import Source


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter's gradient. Clears the gradients."""
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert len(found) == len(list(model.parameters()))
    model.zero_grad()
    return found


def assert_same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different


def kept_for_backward(model: nn.Module, forward: Callable[[], Tensor]) -> list[Tensor]:
    """The tensors that stay in memory between forward and backward pass, each once, without the parameters.

    Args:
        model: whose parameters do not count.
        forward: computes the loss.
    """
    parameters = {p.data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}
    alive: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        alive.append(x)  # so that no address is reused
        if x.data_ptr() not in parameters:
            kept[x.data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = forward()
    for source in _sources(loss.grad_fn):
        for stream in source.streams:
            pack(stream)
    return list(kept.values())


def _sources(node: Any) -> list[Source]:
    """The sources that the functions of a graph read: autograd does not save their streams."""
    found, seen, waiting = [], set(), [node]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(source := getattr(node, "source", None), Source):
            found.append(source)
        waiting += [following for following, _ in node.next_functions]
    return found
