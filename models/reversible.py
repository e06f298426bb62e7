"""The reversible stack: y1 = x1 + F(x2), y2 = x2 + G(y1) in every block (paper, section 3), inverted exactly.

What is special:
- The two residual streams are int32 in units of 2^-16. A branch computes in floating point, its output is
  rounded to that grid once, and integers are added: addition wraps, and subtraction undoes it bit for bit at
  any depth. Floating-point streams drift when inverted (bf16: 12 % at 48 layers).
- The whole stack is one autograd.Function. It keeps the two final streams and nothing for each layer. The
  backward pass takes the blocks in reverse: run G again with gradients, undo it, run F again, undo it.
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

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from models.chance import Seeds
from models.precision import Precision

SCALE = 65536.0
"""Units of a fixed-point stream in 1.0."""

LIMIT = 16384.0
"""Absolute value beyond which the next addition could wrap."""


@dataclass(frozen=True)
class Call:
    """What one pass through the model depends on besides the tokens and the weights.

    training: whether dropout is on. mask: (batch, length) bool, True where a token is real; None = all are.
    """

    seeds: Seeds = field(default_factory=Seeds)
    training: bool = False
    mask: Tensor | None = None


class Branch(Protocol):
    """F or G: (batch, length, dim) fp32 -> (batch, length, dim) in the dtype it computes in."""

    def __call__(self, x: Tensor, call: Call) -> Tensor: ...


class Block(nn.Module):
    """One block: `f`, the attention branch, and `g`, the feed-forward branch."""

    def __init__(self, f: nn.Module, g: nn.Module) -> None:
        super().__init__()
        self.f: Branch = f
        self.g: Branch = g


class FixedPoint:
    """Streams as int32 in units of 1 / SCALE."""

    @staticmethod
    def encode(x: Tensor) -> Tensor:
        """Round to the nearest unit (ties to even); saturate at the ends of the range."""
        # 2147483520 is the largest fp32 below 2^31.
        return (x.float() * SCALE).round_().clamp_(-2147483648.0, 2147483520.0).to(torch.int32)

    @staticmethod
    def decode(stream: Tensor) -> Tensor:
        """fp32 value of a stream. Beyond ±256 its last bits are rounded: the same way every time."""
        return stream.to(torch.float32).mul_(1.0 / SCALE)

    @staticmethod
    def alarm(branch: Tensor, stream: Tensor) -> Tensor:
        """0 (fp32) if both are finite and within ±LIMIT, else NaN. Adds no synchronisation with a device."""
        low, high = torch.aminmax(branch)
        bottom, top = torch.aminmax(stream)
        edge = round(LIMIT * SCALE)
        fine = (low > -LIMIT) & (high < LIMIT) & (bottom > -edge) & (top < edge)
        return torch.where(fine, 0.0, torch.nan)


class FloatingPoint:
    """Streams as fp32: what a reversible network usually does. Inversion is not exact; for comparison."""

    @staticmethod
    def encode(x: Tensor) -> Tensor:
        return x.to(torch.float32, copy=True)

    @staticmethod
    def decode(stream: Tensor) -> Tensor:
        return stream.clone()

    @staticmethod
    def alarm(branch: Tensor, stream: Tensor) -> Tensor:
        return torch.zeros((), device=branch.device)


Arithmetic = type[FixedPoint] | type[FloatingPoint]


class ReversibleStack(nn.Module):
    """Blocks over two streams. residual: `fixed` (int32, exact) or `float` (fp32, drifts)."""

    def __init__(self, blocks: Iterable[Block], residual: str = "fixed") -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.arithmetic: Arithmetic = FixedPoint if residual == "fixed" else FloatingPoint

    def forward(self, x: Tensor, call: Call, *, reverse: bool = True) -> Tensor:
        """Both streams start as x (batch, length, dim); returns them side by side: (batch, length, 2·dim) fp32.

        reverse=False runs the same arithmetic through ordinary autograd, which keeps every activation: the
        twin that the reversible pass equals bit for bit, loss and gradients.
        """
        blocks = cast("Sequence[Block]", self.blocks)
        if not reverse:
            return _ordinary(self.arithmetic, blocks, x, call)
        # The anchor makes the output differentiable for the sake of the blocks even where x is not.
        trained = any(p.requires_grad for p in self.parameters())
        anchor = torch.empty(0, device=x.device, requires_grad=trained)
        return _Reversible.apply(x, anchor, self.arithmetic, blocks, call)


class _Reversible(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, anchor: Tensor, arithmetic: Arithmetic, blocks: Sequence[Block], call: Call
    ) -> Tensor:
        ctx.arithmetic, ctx.blocks, ctx.call = arithmetic, blocks, call
        ctx.precision = Precision.current(x.device)
        ctx.x_dtype = x.dtype
        one = two = arithmetic.encode(x)
        alarm = arithmetic.alarm(x, one)
        with ctx.precision.restored():
            for block in blocks:
                branch = block.f(arithmetic.decode(two), call)
                one = arithmetic.encode(branch).add_(one)
                alarm += arithmetic.alarm(branch, one)
                branch = block.g(arithmetic.decode(one), call)
                two = arithmetic.encode(branch).add_(two)
                alarm += arithmetic.alarm(branch, two)
                del branch
        ctx.save_for_backward(one, two)
        return torch.cat((arithmetic.decode(one), arithmetic.decode(two)), dim=-1).add_(alarm)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if not torch.autograd._is_checkpoint_valid() and any(
            p.requires_grad for p in ctx.blocks.parameters()
        ):
            raise RuntimeError(
                "the reversible stack computes its parameters' gradients inside its own backward pass, so "
                "torch.autograd.grad cannot return them: call loss.backward() and read .grad, "
                "or freeze the stack, or run it with reverse=False"
            )
        one, two = ctx.saved_tensors
        grad_one, grad_two = grads[0].chunk(2, dim=-1)
        for block in reversed(ctx.blocks):
            two, grad_one = _undo(ctx, block.g, two, one, grad_two, grad_one)
            one, grad_two = _undo(ctx, block.f, one, two, grad_one, grad_two)
        return (grad_one + grad_two).to(ctx.x_dtype), None, None, None, None


def _undo(
    ctx: Any, branch: Branch, after: Tensor, source: Tensor, grad: Tensor, grad_source: Tensor
) -> tuple[Tensor, Tensor]:
    """Undo after = before + branch(source): return `before`, and grad_source plus what the branch passes to it.

    Runs the branch once, with gradients, and leaves its parameters' gradients in `.grad`.
    """
    arithmetic: Arithmetic = ctx.arithmetic
    with torch.enable_grad():
        x = arithmetic.decode(source).requires_grad_()
        with ctx.precision.restored():
            y = branch(x, ctx.call)
    step = arithmetic.encode(y.detach())
    before = torch.sub(after, step, out=step)
    torch.autograd.backward(y, grad.to(y.dtype))
    assert x.grad is not None
    return before, x.grad.add_(grad_source)


def _ordinary(arithmetic: Arithmetic, blocks: Iterable[Block], x: Tensor, call: Call) -> Tensor:
    """The stack through ordinary autograd. Each stream is carried twice: encoded, and as the float autograd sees."""
    one = two = arithmetic.encode(x.detach())
    alarm = arithmetic.alarm(x.detach(), one)
    x = _Rounded.apply(x, one, arithmetic)
    # Behind a view of its own, what a stream or a branch passes back adds up before it meets anything else's
    # gradient: the order of sums that the reversible pass has.
    x_one, x_two = x.view_as(x), x.view_as(x)
    for block in blocks:
        branch = block.f(x_two.view_as(x_two), call)
        one = arithmetic.encode(branch.detach()).add_(one)
        alarm += arithmetic.alarm(branch.detach(), one)
        x_one = _Added.apply(x_one, branch, one, arithmetic)
        branch = block.g(x_one.view_as(x_one), call)
        two = arithmetic.encode(branch.detach()).add_(two)
        alarm += arithmetic.alarm(branch.detach(), two)
        x_two = _Added.apply(x_two, branch, two, arithmetic)
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
