"""What one pass through the model depends on, besides the weights and the tokens.

Modules hold no state of a pass. Everything travels in one `Call`, so the backward pass can run a branch again with
exactly what the forward pass had, and several forward passes may precede one backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import Tensor

from megabase.models.chance import Seeds
from megabase.models.sequence import Part
from megabase.models.streams import Source


@dataclass(frozen=True)
class Call:
    """The arguments of one pass.

    Attributes:
        seeds: the source of all random numbers of the pass.
        training: whether dropout is on.
        mask: (batch, length) bool, True where a token is real; None means that all are.
        context: (batch, source length, width) fp32, what cross-attention reads; None without cross-attention.
        context_mask: (batch, source length) bool, True where a source token is real; None means that all are.
        part: the part of every sequence that the tensors of the pass hold; None: the tensors hold whole sequences.
        heads: the heads that this process attends with.
        source: the stream that a branch of a reversible stack reads; None: the branch reads its argument x.
        grad: (batch, length, dim) fp32, the gradient of the branch's output. Set only while the backward pass of the
            reversible stack runs a branch again: the branch may then compute forward and backward together.
    """

    seeds: Seeds = field(default_factory=Seeds)
    training: bool = False
    mask: Tensor | None = None
    context: Tensor | None = None
    context_mask: Tensor | None = None
    part: Part | None = None
    heads: slice = field(default_factory=lambda: slice(None))
    source: Source | None = None
    grad: Tensor | None = None

    @property
    def start(self) -> int:
        """The position of the first token that the tensors of the pass hold."""
        return 0 if self.part is None else self.part.start

    def of_all_positions(self) -> Call:
        """The call of attention between two exchanges of its part: all positions of some heads."""
        assert self.part is not None
        mask = None if self.mask is None else self.part.gather(self.mask)
        return replace(self, mask=mask, part=None)
