"""The feed-forward branch, in chunks of tokens (paper, section 3: "chunking").

The hidden layer is the largest activation of a block, so only one chunk of it is in memory at a time. One
autograd.Function runs the chunks and returns every weight's summed gradient once. (A backward pass for each chunk
would use a weight several times, which ZeRO 2 and 3 refuse.)

Where the reversible stack runs a branch again, the gradient of its output is known already. Then forward and backward
of a chunk run together, while its hidden layer is in the cache: chunking costs no second forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megabase.models.call import Call
from megabase.models.chance import Purpose, dropout
from megabase.models.config import ReformerConfig
from megabase.models.layers import Norm, linear
from megabase.models.precision import Precision

CPU_CHUNK, GPU_CHUNK = 1024, 16384
"""The default number of tokens in a chunk. On a CPU their hidden layer stays in the cache; on a GPU they fill it."""


class FeedForwardBranch(nn.Module):
    """G of a block: norm, feed-forward, dropout; (batch, length, dim) -> the same."""

    def __init__(self, config: ReformerConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.rate = config.dropout
        self.norm = Norm(config.dim, config.norm, config.norm_eps)
        self.feedforward = FeedForward(config)

    def forward(self, x: Tensor, call: Call) -> Tensor:
        x, grad = self.norm(x), call.grad
        if grad is not None:
            grad = grad.to(Precision.current(x.device).compute_dtype(x.dtype))
        if not (call.training and self.rate):
            return self.feedforward(x, grad)
        keys = call.seeds.keys(Purpose.FEEDFORWARD, self.layer, x.shape[0], x.device)
        if grad is not None:
            grad = dropout(grad, self.rate, keys, call.start)
        return dropout(self.feedforward(x, grad), self.rate, keys, call.start)

    def new_cache(self, batch: int, call: Call) -> None:
        """None: a feed-forward branch treats each token on its own, and needs nothing of the tokens before."""

    def read(self, x: Tensor, cache: None, position: int, call: Call) -> Tensor:
        """The branch's output (batch, n, dim) for a block of tokens."""
        return self(x, call)


class FeedForward(nn.Module):
    """Linear map `inner`, activation, linear map `outer`. With swiglu, `inner` makes gate and value side by side."""

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

    def forward(self, x: Tensor, grad: Tensor | None = None) -> Tensor:
        """Run the tokens in chunks.

        Args:
            x: (..., dim).
            grad: (..., dim), the gradient that the result will get, where it is known; else None.

        Returns:
            (..., dim).
        """
        weights = (self.inner, self.inner_bias, self.outer, self.outer_bias)
        tokens, grads = (None if t is None else t.reshape(-1, t.shape[-1]) for t in (x, grad))
        chunk = self.chunk or (CPU_CHUNK if x.device.type == "cpu" else GPU_CHUNK)
        return _Chunked.apply(tokens, grads, self.activation, chunk, *weights).view(x.shape)


def _feedforward(
    x: Tensor, activation: str, inner: Tensor, inner_bias: Tensor, outer: Tensor, outer_bias: Tensor
) -> Tensor:
    hidden = linear(x, inner, inner_bias)
    if activation == "gelu":
        hidden = F.gelu(hidden)
    elif activation == "relu":
        hidden = F.relu(hidden)
    else:
        gate, value = hidden.chunk(2, dim=-1)
        hidden = F.silu(gate) * value
    return linear(hidden, outer, outer_bias)


class _Chunked(torch.autograd.Function):
    """_feedforward of x (tokens, dim), `chunk` tokens at a time. Gradients of weights are summed in fp32.

    grad: (tokens, dim), the gradient that the backward pass will get, or None. With it, the forward pass computes all
    gradients, and the backward pass returns them.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, grad: Tensor | None, activation: str, chunk: int, *weights: Tensor
    ) -> Tensor:
        chunks = _Chunks(activation, chunk, Precision.current(x.device))
        if grad is None:
            ctx.chunks = chunks
            ctx.save_for_backward(x, *weights)
            return chunks.forward(x, *weights)
        ctx.chunks = None
        y, grads = chunks.forward_and_backward(x, grad, *weights)
        ctx.save_for_backward(*grads)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        if ctx.chunks is None:
            grad_x, *grad_weights = saved
        else:
            x, *weights = saved
            _, (grad_x, *grad_weights) = ctx.chunks.forward_and_backward(x, grads[0], *weights)
        return grad_x, None, None, None, *grad_weights


@dataclass(frozen=True)
class _Chunks:
    """Runs a feed-forward in chunks of tokens, in the precision (autocast) of the forward pass."""

    activation: str
    chunk: int
    precision: Precision

    def forward(self, x: Tensor, *weights: Tensor) -> Tensor:
        """(tokens, dim) -> the same."""
        out: Tensor | None = None
        with self.precision.restored():
            for part in self.parts(x):
                y = _feedforward(x[part], self.activation, *weights)
                out = x.new_empty(x.shape, dtype=y.dtype) if out is None else out
                out[part] = y
        assert out is not None
        return out

    def forward_and_backward(self, x: Tensor, grad: Tensor, *weights: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The output (tokens, dim) of x, and the gradients of x and of every weight, given the output's gradient."""
        out, grad_x = torch.empty_like(grad), torch.empty_like(x)
        leaves = [weight.detach().requires_grad_() for weight in weights]
        sums = [torch.zeros_like(w, dtype=torch.promote_types(w.dtype, torch.float32)) for w in weights]
        for part in self.parts(x):
            with torch.enable_grad(), self.precision.restored():
                piece = x[part].detach().requires_grad_()
                y = _feedforward(piece, self.activation, *leaves)
            out[part] = y.detach()
            with torch.autocast(x.device.type, enabled=False):  # as in any backward pass
                grad_x[part], *grad_weights = torch.autograd.grad(y, [piece, *leaves], grad[part])
            for total, grad_weight in zip(sums, grad_weights, strict=True):
                total += grad_weight
        return out, [grad_x, *(total.to(w.dtype) for total, w in zip(sums, weights, strict=True))]

    def parts(self, x: Tensor) -> Iterator[slice]:
        for start in range(0, x.shape[0], self.chunk):
            yield slice(start, start + self.chunk)
