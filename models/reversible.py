"""The reversible stack: y1 = x1 + F(x2), y2 = x2 + G(y1) in every block (paper, section 3), inverted exactly.

What is special:
- The two residual streams are int32 in units of 2^-16. A branch computes in floating point, its output is
  rounded to that grid once, and integers are added: addition wraps, and subtraction undoes it bit for bit at
  any depth. Floating-point streams drift when inverted (bf16: 12 % at 48 layers).
- The whole stack is one autograd.Function. It saves the two final streams, and nothing for each layer. The
  backward pass visits the branches in reverse: it runs a branch again with gradients, subtracts its output, and
  continues with the branch before. It overwrites the streams and their gradients: 16 bytes for each position and
  channel, besides what one branch needs.
- Branches, and what comes after the stack, read streams without a copy of them in floating point (streams.py).
- A branch reads the stream that was written last and adds to the other one. So a block may have any number of
  branches; a decoder's block has a third, cross-attention, between F and G (as in trax).
- The context that cross-attention reads is an input of the Function. The gradients that the branches return for
  it are summed in fp32 and passed on once. It is saved once, whatever the depth.
- Rounding passes gradients unchanged (straight through); along the streams they are fp32.
- Modules hold no state of a pass: everything a pass depends on (`Call`, autocast) is saved with it. So any number
  of forward passes may precede a backward pass, and calling eval() in between changes nothing.

Branches are called as modules, and every block's backward is a nested torch.autograd.backward: hooks on
modules and parameters (DDP, ZeRO 1 to 3) fire once for each parameter, when its block is visited. Consequences:
`loss.backward()` fills `.grad`; `torch.autograd.grad` for parameters is refused; a module shared by two blocks
works in plain torch, but not under ZeRO 2 and 3.

Range: the grid holds ±32768. Branch outputs and streams are checked against ±16384, below which no addition
can wrap. If one is larger or not finite, the stack's output is NaN, so that a diverging run is noticed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils.checkpoint import CheckpointFunction

from megabase.models.call import Call
from megabase.models.precision import Precision
from megabase.models.streams import (
    Arithmetic,
    FixedPoint,
    FloatingPoint,
    Source,
    decoded,
    host_copy,
    moved,
    wait_for_copies,
)


class Branch(Protocol):
    """F, G or cross-attention: (batch, length, dim) -> (batch, length, dim) in the dtype it computes in.

    x is the link of `call.source`, which the branch reads; without a source it is the input itself, in fp32.
    """

    def __call__(self, x: Tensor, call: Call) -> Tensor: ...


class Block(nn.Module):
    """One block: `f`, the attention branch, `g`, the feed-forward branch, and between them a decoder's `cross`."""

    def __init__(self, f: nn.Module, g: nn.Module, cross: nn.Module | None = None) -> None:
        super().__init__()
        self.f: Branch = f
        self.g: Branch = g
        self.cross: Branch | None = cross

    @property
    def branches(self) -> list[Branch]:
        """The branches in the order in which they run."""
        return [self.f, self.g] if self.cross is None else [self.f, self.cross, self.g]


class ReversibleStack(nn.Module):
    """Blocks over two residual streams.

    Args:
        blocks: the blocks, in the order in which they run.
        residual: `fixed` (int32, exact) or `float` (fp32, drifts).

    Attributes:
        offload: keep the streams and their gradients in host memory while a GPU computes: less memory of the GPU for
            longer sequences, the same numbers, and the time of moving them. Every branch moves each stream to the GPU
            and back.
    """

    offload = False

    def __init__(self, blocks: Iterable[Block], residual: str = "fixed") -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.arithmetic: Arithmetic = FixedPoint if residual == "fixed" else FloatingPoint

    @property
    def branches(self) -> list[Branch]:
        """The branches of all blocks, in the order in which they run."""
        return [branch for block in cast("Sequence[Block]", self.blocks) for branch in block.branches]

    def forward(self, x: Tensor, call: Call, *, reverse: bool = True) -> Tensor:
        """Run the stack. Both streams start as x.

        Args:
            x: (batch, length, dim).
            call: what the pass depends on.
            reverse: False runs the same arithmetic through ordinary autograd, which keeps every activation: the
                reference that the reversible pass equals bit for bit, loss and gradients.

        Returns:
            Both streams side by side, (batch, length, 2·dim) fp32. `streams` makes no such copy of them.

        Raises:
            RuntimeError: see `streams`.
        """
        if not reverse:
            context, call = _without_context(call)
            return _run_with_autograd(self.arithmetic, self.branches, x, context, call)
        return decoded(*self.streams(x, call))

    def streams(self, x: Tensor, call: Call) -> tuple[Tensor, Source]:
        """Run the stack, reversibly. x, call: see `forward`.

        Returns:
            The link of both streams, and their source.

        Raises:
            RuntimeError: in the backward pass, if `torch.autograd.grad` or `backward(inputs=...)` started it and the
                stack has trainable parameters.
        """
        context, call = _without_context(call)
        # The anchor makes the output require a gradient if a block has trainable parameters, even if x requires none.
        trained = any(p.requires_grad for p in self.parameters())
        anchor = torch.empty(0, device=x.device, requires_grad=trained)
        final: list[Source] = []
        link = _Reversible.apply(x, context, anchor, self, call, final)
        return link, final[0]

    @torch.no_grad()
    def run(
        self, x: Tensor, branches: Iterable[Callable[[Tensor], Tensor]], layers: Collection[int] = ()
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Run other `branches` in place of the stack's own, without gradients.

        Args:
            x: (batch, length, dim).
            branches: as many as the stack has; each takes and returns (batch, length, dim).
            layers: numbers of blocks, from 0, whose output is returned too.

        Returns:
            Both streams side by side, (batch, length, 2·dim) fp32, after the last block and after each of `layers`.
        """
        arithmetic, outputs = self.arithmetic, {}
        of_streams = (_of_stream(arithmetic, branch) for branch in branches)
        streams = _start(arithmetic, x)
        for layer, block in enumerate(cast("Sequence[Block]", self.blocks)):
            streams = _advance(arithmetic, islice(of_streams, len(block.branches)), *streams)
            if layer in layers:
                outputs[layer] = _join(arithmetic, *streams)
        return _join(arithmetic, *streams), outputs


def _without_context(call: Call) -> tuple[Tensor | None, Call]:
    """The context in fp32, so that the gradients of many branches are summed in fp32; and the call without it."""
    return None if call.context is None else call.context.float(), replace(call, context=None)


def _of_stream(arithmetic: Arithmetic, branch: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A branch of floats as one that takes a stream."""
    return lambda stream: branch(arithmetic.decode(stream))


def _start(arithmetic: Arithmetic, x: Tensor, *, offload: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """The older stream, the one that was written last (equal at the start), and `invalid` (see FixedPoint)."""
    invalid = torch.zeros((), dtype=torch.float32, device=x.device)
    stream = arithmetic.encode(x, invalid)
    if offload:
        return host_copy(stream), host_copy(stream), invalid
    return stream, stream.clone(), invalid


def _advance(
    arithmetic: Arithmetic,
    branches: Iterable[Callable[[Tensor], Tensor]],
    older: Tensor,
    newer: Tensor,
    invalid: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run branches, each of which takes a stream. Takes and returns what `_start` returns."""
    for branch in branches:
        arithmetic.add_(older, branch(newer), invalid)
        older, newer = newer, older
    return older, newer, invalid


def _join(arithmetic: Arithmetic, older: Tensor, newer: Tensor, invalid: Tensor) -> Tensor:
    """Both streams side by side, (batch, length, 2·dim) fp32; all NaN if a number left the range."""
    return torch.cat((arithmetic.decode(older), arithmetic.decode(newer)), dim=-1).add_(invalid)


class _Reversible(torch.autograd.Function):
    """The stack: x -> the link of both streams, whose source is appended to `final`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        context: Tensor | None,
        anchor: Tensor,
        stack: ReversibleStack,
        call: Call,
        final: list[Source],
    ) -> Tensor:
        ctx.stack, ctx.call = stack, call
        ctx.precision = Precision.current(x.device)
        ctx.x_dtype = x.dtype
        ctx.save_for_backward(context)
        context = None if context is None else context.detach()
        forward = _Forward(
            stack.arithmetic, stack.branches, replace(call, context=context), ctx.precision, x.device
        )
        older, newer, invalid = forward.run(*_start(stack.arithmetic, x, offload=stack.offload))
        ctx.source = Source(stack.arithmetic, (older, newer), None, x.device, invalid, forward.again)
        final.append(ctx.source)
        return torch.zeros((), dtype=torch.float32, device=x.device)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        stack: ReversibleStack = ctx.stack
        trained = any(p.requires_grad for p in stack.parameters())
        if trained and not _accumulates_everywhere(grads[0].device):
            raise RuntimeError(
                "the reversible stack computes its parameters' gradients inside its own backward pass, so "
                "torch.autograd.grad cannot return them: call loss.backward() and read .grad, "
                "or freeze the stack, or run it with reverse=False"
            )
        (context,) = ctx.saved_tensors
        if context is not None:
            context = context.detach().requires_grad_(ctx.needs_input_grad[1])
        (older, newer), (grad_older, grad_newer) = ctx.source.take()
        for branch in reversed(stack.branches):
            _invert(ctx, branch, newer, older, context, grad_newer, grad_older)
            older, newer = newer, older
            grad_older, grad_newer = grad_newer, grad_older
        ctx.source.start = newer
        grad_context = None if context is None else context.grad
        wait_for_copies(grad_older, ctx.source.device)
        grad_x = moved(grad_older.add_(grad_newer), ctx.source.device, ctx.x_dtype)
        return grad_x, grad_context, None, None, None, None


@dataclass(frozen=True)
class _Forward:
    """Runs branches without gradients, on `device`."""

    arithmetic: Arithmetic
    branches: Sequence[Branch]
    call: Call
    precision: Precision
    device: torch.device

    @torch.no_grad()
    def run(self, older: Tensor, newer: Tensor, invalid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Takes what `_start` returns, and overwrites it with what it returns: the same after all branches."""
        link = torch.zeros_like(invalid)

        def computed(branch: Branch, stream: Tensor) -> Tensor:
            source = Source(self.arithmetic, (stream,), device=self.device)
            return branch(link, replace(self.call, source=source))

        with self.precision.restored():
            branches = (partial(computed, branch) for branch in self.branches)
            return _advance(self.arithmetic, branches, older, newer, invalid)

    def again(self, start: Tensor) -> tuple[Tensor, Tensor]:
        """The final streams of what both streams started as, which is overwritten."""
        invalid = torch.zeros((), dtype=torch.float32, device=self.device)
        wait_for_copies(start, self.device)
        same = torch.empty_like(start, pin_memory=start.is_pinned()).copy_(start)
        older, newer, _ = self.run(start, same, invalid)
        return older, newer


def _accumulates_everywhere(device: torch.device) -> bool:
    """Whether the backward pass that is running fills `.grad` of every parameter.

    It does when `backward()` started it without `inputs`; `torch.autograd.grad` and `backward(inputs=...)` fill or
    return the gradients of some tensors only. Torch has no function that tells the two cases apart. But the backward
    pass of a reentrant activation checkpoint raises RuntimeError in the second case, for the same reason as this stack,
    and a backward pass that runs inside another one is in the same case. So this function checkpoints a scalar on
    `device` and runs its backward pass (0.3 ms).
    """
    scalar = torch.zeros((), device=device, requires_grad=True)
    with torch.enable_grad():
        copy = CheckpointFunction.apply(torch.clone, False, scalar)
    try:
        copy.backward()
    except RuntimeError:
        return False
    return True


def _invert(
    ctx: Any,
    branch: Branch,
    after: Tensor,
    stream: Tensor,
    context: Tensor | None,
    grad: Tensor,
    grad_stream: Tensor,
) -> None:
    """Invert after = before + branch(stream): `after` becomes `before`.

    Runs the branch once, with gradients. Adds the gradients of its parameters, and of the context (a leaf), to their
    `.grad`, and that of `stream` to `grad_stream`.

    Args:
        ctx: the context of the `_Reversible` that is running.
        after, stream: the two streams (batch, length, dim).
        context: see Call.
        grad, grad_stream: their gradients, fp32.
    """
    arithmetic: Arithmetic = ctx.stack.arithmetic
    link = torch.zeros((), dtype=torch.float32, device=ctx.source.device, requires_grad=True)
    with torch.enable_grad():
        # Each branch reads a view of its own, so that autograd first sums the gradients within a branch.
        context_view = None if context is None else context.view_as(context)
        source = Source(arithmetic, (stream,), (grad_stream,), ctx.source.device)
        with ctx.precision.restored():
            y = branch(link, replace(ctx.call, context=context_view, source=source, grad=grad))
    arithmetic.subtract_(after, y.detach())
    # Free the output before its gradient is made, which needs as much memory.
    device, dtype, edge = y.device, y.dtype, get_gradient_edge(y)
    del y
    torch.autograd.backward(edge, moved(grad, device, dtype))


def _run_with_autograd(
    arithmetic: Arithmetic, branches: Iterable[Branch], x: Tensor, context: Tensor | None, call: Call
) -> Tensor:
    """The stack through ordinary autograd. Each stream exists twice: encoded, and as a float for autograd."""
    older, newer, invalid = _start(arithmetic, x.detach())
    x = _Rounded.apply(x, newer, arithmetic)
    # Each reader of a stream or of the context gets a view of its own, so that autograd first sums the gradients within
    # a reader: that is the order of sums in the reversible pass.
    x_older, x_newer = x.view_as(x), x.view_as(x)
    for branch in branches:
        context_view = None if context is None else context.view_as(context)
        y = branch(x_newer.view_as(x_newer), replace(call, context=context_view))
        arithmetic.add_(older, y.detach(), invalid)
        older, newer = newer, older
        x_older, x_newer = x_newer, _Added.apply(x_older, y, newer, arithmetic)
    return torch.cat((x_older, x_newer), dim=-1) + invalid


class _Rounded(torch.autograd.Function):
    """Replace x by the value of the stream that it was encoded to; gradients pass straight through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stream: Tensor, arithmetic: Arithmetic) -> Tensor:
        ctx.x_dtype = x.dtype
        return arithmetic.decode(stream)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0].to(ctx.x_dtype), None, None


class _Added(torch.autograd.Function):
    """x + output, whose sum the stream holds; gradients pass straight through to both."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, output: Tensor, stream: Tensor, arithmetic: Arithmetic) -> Tensor:
        ctx.output_dtype = output.dtype
        return arithmetic.decode(stream)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], grads[0].to(ctx.output_dtype), None, None
