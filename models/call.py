"""What one pass through the model depends on, besides the weights and the tokens.

Modules hold no state of a pass. Everything travels in one `Call`, so the backward pass can run a branch again with
exactly what the forward pass had, and several forward passes may precede one backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from megabase.models.chance import Seeds


@dataclass(frozen=True)
class Call:
    """The arguments of one pass.

    Attributes:
        seeds: the source of all random numbers of the pass.
        training: whether dropout is on.
        mask: (batch, length) bool, True where a token is real; None means that all are.
        context: (batch, source length, width) fp32, what cross-attention reads; None without cross-attention.
        context_mask: (batch, source length) bool, True where a source token is real; None means that all are.
        grad: (batch, length, dim) fp32, the gradient of the branch's output. Set only while the backward pass of the
            reversible stack runs a branch again: the branch may then compute forward and backward together.
    """

    seeds: Seeds = field(default_factory=Seeds)
    training: bool = False
    mask: Tensor | None = None
    context: Tensor | None = None
    context_mask: Tensor | None = None
    grad: Tensor | None = None
