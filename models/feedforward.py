"""The feed-forward branch, in chunks of tokens (paper, section 3: "chunking").

The hidden layer is the largest activation of a block. With `chunk` set it never exists whole: one
autograd.Function runs the chunks, forward and again in backward, and returns every weight's summed gradient
once. (A backward for each chunk would use a weight several times in one pass, which ZeRO 2 and 3 refuse.)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.chance import Purpose, dropout
from models.config import ReformerConfig
from models.layers import Norm
from models.precision import Precision
from models.reversible import Call


class FeedForwardBranch(nn.Module):
    """G of a block: norm, feed-forward, dropout; (batch, length, dim) -> the same."""

    def __init__(self, config: ReformerConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.rate = config.dropout
        self.norm = Norm(config.dim, config.norm, config.norm_eps)
        self.feedforward = FeedForward(config)

    def forward(self, x: Tensor, call: Call) -> Tensor:
        y = self.feedforward(self.norm(x))
        if not (call.training and self.rate):
            return y
        keys = call.seeds.keys(Purpose.FEEDFORWARD, self.layer, x.shape[0], x.device)
        return dropout(y, self.rate, keys)


class FeedForward(nn.Module):
    """inner, activation, outer; with swiglu `inner` makes gate and value side by side."""

    def __init__(self, config: ReformerConfig) -> None:
        super().__init__()
        self.activation = config.feedforward.activation
        self.chunk = config.feedforward.chunk
        wide = 2 * config.hidden if self.activation == "swiglu" else config.hidden
        self.inner = nn.Parameter(torch.randn(wide, config.dim) * config.dim**-0.5)
        self.inner_bias = nn.Parameter(torch.zeros(wide))
        self.outer = nn.Parameter(
            torch.randn(config.dim, config.hidden) * (config.hidden * config.depth) ** -0.5
        )
        self.outer_bias = nn.Parameter(torch.zeros(config.dim))

    def forward(self, x: Tensor) -> Tensor:
        weights = (self.inner, self.inner_bias, self.outer, self.outer_bias)
        tokens = x.reshape(-1, x.shape[-1])
        if self.chunk == 0 or self.chunk >= tokens.shape[0]:
            return _feedforward(x, self.activation, *weights)
        return _Chunked.apply(tokens, self.activation, self.chunk, *weights).view(x.shape)


def _feedforward(
    x: Tensor, activation: str, inner: Tensor, inner_bias: Tensor, outer: Tensor, outer_bias: Tensor
) -> Tensor:
    hidden = F.linear(x, inner, inner_bias)
    if activation == "gelu":
        hidden = F.gelu(hidden)
    elif activation == "relu":
        hidden = F.relu(hidden)
    else:
        gate, value = hidden.chunk(2, dim=-1)
        hidden = F.silu(gate) * value
    return F.linear(hidden, outer, outer_bias)


class _Chunked(torch.autograd.Function):
    """_feedforward of x (tokens, dim), `chunk` tokens at a time. Gradients of weights are summed in fp32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, activation: str, chunk: int, *weights: Tensor) -> Tensor:
        ctx.activation, ctx.chunk = activation, chunk
        ctx.precision = Precision.current(x.device)
        ctx.save_for_backward(x, *weights)
        with ctx.precision.restored():
            y = torch.cat([_feedforward(piece, activation, *weights) for piece in x.split(chunk)])
        ctx.dtype = y.dtype
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *saved = ctx.saved_tensors
        grad_x = torch.empty_like(x)
        weights = [weight.detach().requires_grad_() for weight in saved]
        sums = [
            torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
            for weight in saved
        ]
        for start in range(0, x.shape[0], ctx.chunk):
            part = slice(start, start + ctx.chunk)
            with torch.enable_grad(), ctx.precision.restored():
                piece = x[part].detach().requires_grad_()
                y = _feedforward(piece, ctx.activation, *weights)
            grad_x[part], *grad_weights = torch.autograd.grad(y, [piece, *weights], grads[0][part])
            for total, grad in zip(sums, grad_weights, strict=True):
                total += grad
        return grad_x, None, None, *(total.to(w.dtype) for total, w in zip(sums, saved, strict=True))
