"""The reversible stack: y1 = x1 + F(x2), y2 = x2 + G(y1) in every block (paper, section 3), inverted exactly.

What is special:
- The two residual streams are int32 in units of 2^-16. A branch computes in floating point, its output is
  rounded to that grid once, and integers are added: addition wraps, and subtraction undoes it bit for bit at
  any depth. Floating-point streams drift when inverted (bf16: 12 % at 48 layers).
- The whole stack is one autograd.Function. It keeps the two final streams and nothing for each layer. The
  backward pass takes the branches in reverse: run one again with gradients, undo it, go on to the one before.
- A branch adds to the stream that was written before the last, and reads the last. So a block may have any
  number of them; a decoder's has a third, cross-attention, between F and G (as in trax).
- What cross-attention reads, the context, is an input of the Function, detached for each branch anew: what the
  branches pass back to it is summed in fp32 and returned once. It is kept once, whatever the depth.
- Rounding passes gradients unchanged (straight through); along the streams they are fp32.
- No state on modules: all a pass depends on (seeds, training mode, mask, autocast) is captured with it, so
  any number of forwards may precede a backward, and a switch to eval() in between harms nothing.

Branches are called as modules, and every block's backward is a nested torch.autograd.backward: hooks on
modules and parameters (DDP, ZeRO 1 to 3) fire once for each parameter, in its block's turn. Consequences:
`loss.backward()` fills `.grad`; `torch.autograd.grad` for parameters is refused; a module used by two blocks
works in plain torch, but not under ZeRO 2 and 3.

Range: the grid holds ±32768. Branch outputs and streams are watched against ±16384, below which no addition
can wrap. Past it, and for anything not finite, the stack's output is NaN: a run that diverges shows it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from megabase.models import fused
from megabase.models.chance import Seeds
from megabase.models.device import pieces
from megabase.models.precision import Precision

SCALE = 65536.0
"""Units of a fixed-point stream in 1.0."""

LIMIT = 16384.0
"""Absolute value beyond which the next addition could wrap."""


@dataclass(frozen=True)
class Call:
    """What one pass through the model depends on besides the tokens and the weights.

    training: whether dropout is on. mask: (batch, length) bool, True where a token is real; None = all are.
    context: (batch, source length, width) fp32, what cross-attention reads, and context_mask: (batch, source
    length) bool, like mask; None where there is no cross-attention.
    grad: (batch, length, dim) fp32, the gradient that the branch's output is going to get. Known where the backward
    pass of the reversible stack runs a branch again, so that it may do both in one go; else None.
    """

    seeds: Seeds = field(default_factory=Seeds)
    training: bool = False
    mask: Tensor | None = None
    context: Tensor | None = None
    context_mask: Tensor | None = None
    grad: Tensor | None = None


class Branch(Protocol):
    """F, G or cross-attention: (batch, length, dim) fp32 -> (batch, length, dim) in the dtype it computes in."""

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
        """In the order in which they run."""
        return [self.f, self.g] if self.cross is None else [self.f, self.cross, self.g]


class FixedPoint:
    """Streams as int32 in units of 1 / SCALE. On a GPU each of these is one pass over memory."""

    @staticmethod
    def encode(x: Tensor, alarm: Tensor | None = None) -> Tensor:
        """Round to the nearest unit (ties to even); saturate at the ends of the range. alarm: see `add`."""
        if fused.fits(x):
            return fused.add_to_stream(None, x, 1, SCALE, LIMIT, alarm)
        stream = torch.empty(x.shape, dtype=torch.int32, device=x.device)
        flat, source = stream.view(-1), x.reshape(-1)
        for part in pieces(flat.shape[0], 1, x.device):
            # 2147483520 is the largest fp32 below 2^31.
            flat[part] = (source[part].float() * SCALE).round_().clamp_(-2147483648.0, 2147483520.0)
        if alarm is not None:
            FixedPoint.watch(x, stream, alarm)
        return stream

    @staticmethod
    def decode(stream: Tensor) -> Tensor:
        """fp32 value of a stream. Beyond ±256 its last bits are rounded: the same way every time."""
        if stream.is_cuda:
            return fused.decode(stream, 1.0 / SCALE)
        return stream.to(torch.float32).mul_(1.0 / SCALE)

    @staticmethod
    def add(stream: Tensor, branch: Tensor, alarm: Tensor) -> Tensor:
        """The stream plus a branch's output. alarm: a scalar fp32; becomes NaN if one of the two is not finite or
        beyond ±LIMIT. Adds no synchronisation with a device."""
        if fused.fits(branch):
            return fused.add_to_stream(stream, branch, 1, SCALE, LIMIT, alarm)
        result = FixedPoint.encode(branch).add_(stream)
        FixedPoint.watch(branch, result, alarm)
        return result

    @staticmethod
    def subtract(stream: Tensor, branch: Tensor) -> Tensor:
        """What the stream was before `add`."""
        if fused.fits(branch):
            return fused.add_to_stream(stream, branch, -1, SCALE, LIMIT, None)
        step = FixedPoint.encode(branch)
        return torch.sub(stream, step, out=step)

    @staticmethod
    def watch(x: Tensor, stream: Tensor, alarm: Tensor) -> None:
        """What `add` says of the alarm."""
        low, high = torch.aminmax(x)
        bottom, top = torch.aminmax(stream)
        edge = round(LIMIT * SCALE)
        fine = (low > -LIMIT) & (high < LIMIT) & (bottom > -edge) & (top < edge)
        alarm += torch.where(fine, 0.0, torch.nan)


class FloatingPoint:
    """Streams as fp32: what a reversible network usually does. Inversion is not exact; for comparison."""

    @staticmethod
    def encode(x: Tensor, alarm: Tensor | None = None) -> Tensor:
        return x.to(torch.float32, copy=True)

    @staticmethod
    def decode(stream: Tensor) -> Tensor:
        return stream.clone()

    @classmethod
    def add(cls, stream: Tensor, branch: Tensor, alarm: Tensor) -> Tensor:
        return cls.encode(branch).add_(stream)

    @classmethod
    def subtract(cls, stream: Tensor, branch: Tensor) -> Tensor:
        return stream - cls.encode(branch)


Arithmetic = type[FixedPoint] | type[FloatingPoint]


class ReversibleStack(nn.Module):
    """Blocks over two streams. residual: `fixed` (int32, exact) or `float` (fp32, drifts)."""

    def __init__(self, blocks: Iterable[Block], residual: str = "fixed") -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.arithmetic: Arithmetic = FixedPoint if residual == "fixed" else FloatingPoint

    @property
    def branches(self) -> list[Branch]:
        """Those of all blocks, in the order in which they run."""
        return [branch for block in cast("Sequence[Block]", self.blocks) for branch in block.branches]

    def forward(self, x: Tensor, call: Call, *, reverse: bool = True) -> Tensor:
        """Both streams start as x (batch, length, dim); returns them side by side: (batch, length, 2·dim) fp32.

        reverse=False runs the same arithmetic through ordinary autograd, which keeps every activation: the
        twin that the reversible pass equals bit for bit, loss and gradients.
        """
        # In fp32, so that what many branches pass back to it is summed in fp32.
        context = None if call.context is None else call.context.float()
        call = replace(call, context=None)
        if not reverse:
            return _ordinary(self.arithmetic, self.branches, x, context, call)
        # The anchor makes the output differentiable for the sake of the blocks even where x is not.
        trained = any(p.requires_grad for p in self.parameters())
        anchor = torch.empty(0, device=x.device, requires_grad=trained)
        return _Reversible.apply(x, context, anchor, self, call)

    @torch.no_grad()
    def run(self, x: Tensor, branches: Iterable[Callable[[Tensor], Tensor]]) -> Tensor:
        """The stack's output with other `branches` in the place of its own, and no gradients."""
        one, two, alarm = _advance(self.arithmetic, branches, x)
        return _side_by_side(self.arithmetic, one, two, alarm)


def _advance(
    arithmetic: Arithmetic, branches: Iterable[Callable[[Tensor], Tensor]], x: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The streams behind `branches`, the one written last at the second place, and the alarm of all of them."""
    alarm = torch.zeros((), dtype=torch.float32, device=x.device)
    one = two = arithmetic.encode(x, alarm)
    for branch in branches:
        one, two = two, arithmetic.add(one, branch(arithmetic.decode(two)), alarm)
    return one, two, alarm


def _side_by_side(arithmetic: Arithmetic, one: Tensor, two: Tensor, alarm: Tensor) -> Tensor:
    return torch.cat((arithmetic.decode(one), arithmetic.decode(two)), dim=-1).add_(alarm)


class _Reversible(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, context: Tensor | None, anchor: Tensor, stack: ReversibleStack, call: Call
    ) -> Tensor:
        ctx.stack, ctx.call = stack, call
        ctx.precision = Precision.current(x.device)
        ctx.x_dtype = x.dtype
        call = replace(call, context=context)
        with ctx.precision.restored():
            branches = (partial(branch, call=call) for branch in stack.branches)
            one, two, alarm = _advance(stack.arithmetic, branches, x)
        ctx.save_for_backward(one, two, context)
        return _side_by_side(stack.arithmetic, one, two, alarm)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        stack: ReversibleStack = ctx.stack
        if not torch.autograd._is_checkpoint_valid() and any(p.requires_grad for p in stack.parameters()):
            raise RuntimeError(
                "the reversible stack computes its parameters' gradients inside its own backward pass, so "
                "torch.autograd.grad cannot return them: call loss.backward() and read .grad, "
                "or freeze the stack, or run it with reverse=False"
            )
        one, two, context = ctx.saved_tensors
        if context is not None:
            context = context.detach().requires_grad_(ctx.needs_input_grad[1])
        grad_one, grad_two = grads[0].chunk(2, dim=-1)
        for branch in reversed(stack.branches):
            before, grad_source = _undo(ctx, branch, two, one, context, grad_two, grad_one)
            one, two = before, one
            grad_one, grad_two = grad_two, grad_source
        grad_context = None if context is None else context.grad
        return (grad_one + grad_two).to(ctx.x_dtype), grad_context, None, None, None


def _undo(
    ctx: Any,
    branch: Branch,
    after: Tensor,
    source: Tensor,
    context: Tensor | None,
    grad: Tensor,
    grad_source: Tensor,
) -> tuple[Tensor, Tensor]:
    """Undo after = before + branch(source): return `before`, and grad_source plus what the branch passes to it.

    Runs the branch once, with gradients; leaves its parameters' gradients in their `.grad`, and adds what it
    passes to the context, a leaf, to the context's.
    """
    arithmetic: Arithmetic = ctx.stack.arithmetic
    with torch.enable_grad():
        x = arithmetic.decode(source).requires_grad_()
        # Behind a view of its own, what one branch passes back adds up before it meets that of the others.
        own = None if context is None else context.view_as(context)
        with ctx.precision.restored():
            y = branch(x, replace(ctx.call, context=own, grad=grad))
    before = arithmetic.subtract(after, y.detach())
    torch.autograd.backward(y, grad.to(y.dtype))
    assert x.grad is not None
    return before, x.grad.add_(grad_source)


def _ordinary(
    arithmetic: Arithmetic, branches: Iterable[Branch], x: Tensor, context: Tensor | None, call: Call
) -> Tensor:
    """The stack through ordinary autograd. Each stream is carried twice: encoded, and as the float autograd sees."""
    alarm = torch.zeros((), dtype=torch.float32, device=x.device)
    one = two = arithmetic.encode(x.detach(), alarm)
    x = _Rounded.apply(x, one, arithmetic)
    # Behind a view of its own, what a stream or a branch passes back adds up before it meets anything else's
    # gradient: the order of sums that the reversible pass has.
    x_one, x_two = x.view_as(x), x.view_as(x)
    for branch in branches:
        own = None if context is None else context.view_as(context)
        y = branch(x_two.view_as(x_two), replace(call, context=own))
        one, two = two, arithmetic.add(one, y.detach(), alarm)
        x_one, x_two = x_two, _Added.apply(x_one, y, two, arithmetic)
    return torch.cat((x_one, x_two), dim=-1) + alarm


class _Rounded(torch.autograd.Function):
    """x as the stream it was encoded to; gradients pass straight through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stream: Tensor, arithmetic: Arithmetic) -> Tensor:
        ctx.x_dtype = x.dtype
        return arithmetic.decode(stream)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0].to(ctx.x_dtype), None, None


class _Added(torch.autograd.Function):
    """x + branch, whose sum the stream holds; gradients pass straight through to both."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, branch: Tensor, stream: Tensor, arithmetic: Arithmetic) -> Tensor:
        ctx.branch_dtype = branch.dtype
        return arithmetic.decode(stream)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], grads[0].to(ctx.branch_dtype), None, None
