"""The feed-forward branch, in chunks of tokens (paper, section 3: "chunking").

The hidden layer is the largest activation of a block, so only one chunk of it is in memory at a time, with the chunk's
norm and its gradients. One autograd.Function runs the chunks and returns every weight's summed gradient once. (A
backward pass for each chunk would use a weight several times, which ZeRO 2 and 3 refuse.)

Where the reversible stack runs a branch again, forward and backward of a chunk run together (known_gradient.py), while
its hidden layer is in the cache: chunking costs no second forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megabase.models.call import Call
from megabase.models.chance import Purpose, dropout
from megabase.models.config import ReformerConfig
from megabase.models.known_gradient import compute
from megabase.models.layers import linear
from megabase.models.norm import Norm, norm
from megabase.models.precision import Precision
from megabase.models.streams import Rows, Source, moved

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
        source, grad = call.source, call.grad
        chunks = self.feedforward.chunks(x.device, self.norm.eps, source)
        weights = (self.norm.weight, self.norm.bias, *self.feedforward.weights)
        if not (call.training and self.rate):
            return compute(chunks, grad, x, *weights)
        batch = (x if source is None else source).shape[0]
        keys = call.seeds.keys(Purpose.FEEDFORWARD, self.layer, batch, x.device)
        if grad is not None:
            grad = moved(grad, x.device, chunks.precision.compute_dtype(self.norm.weight.dtype))
            grad = dropout(grad, self.rate, keys, call.start)
        return dropout(compute(chunks, grad, x, *weights), self.rate, keys, call.start)

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

    @property
    def weights(self) -> tuple[Tensor, ...]:
        """The parameters, in the order in which `_feedforward` takes them."""
        return self.inner, self.inner_bias, self.outer, self.outer_bias

    def chunks(self, device: torch.device, eps: float = 0.0, source: Source | None = None) -> _Chunks:
        """How tokens are computed on `device`. eps: of the norm before. source: read instead of a tensor."""
        chunk = self.chunk or (CPU_CHUNK if device.type == "cpu" else GPU_CHUNK)
        return _Chunks(self.activation, chunk, eps, Precision.current(device), source)

    def forward(self, x: Tensor) -> Tensor:
        """Run normalised tokens in chunks: (..., dim) -> the same."""
        return compute(self.chunks(x.device), None, x, None, None, *self.weights)


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


@dataclass(frozen=True)
class _Chunks:
    """Norm and feed-forward of x (..., dim), or of a source, in chunks of tokens, in the precision of the forward pass.

    The argument `weights`: weight and bias of the norm (a weight of None: no norm; a bias of None: RMS norm), and
    `FeedForward.weights`.
    """

    activation: str
    chunk: int
    eps: float
    precision: Precision
    source: Source | None

    def forward(self, x: Tensor, *weights: Tensor | None) -> Tensor:
        """The output (..., dim). x: the source's link, if there is a source."""
        rows, out = Rows(x, self.source), None
        for part in rows.parts(self.chunk):
            with self.precision.restored():
                y = self.branch(rows.floats(part), weights)
            out = _filled(out, part, y, rows.shape)
        assert out is not None
        return out.view(rows.shape)

    def forward_and_backward(
        self, grad: Tensor, x: Tensor, *weights: Tensor | None
    ) -> tuple[Tensor, list[Tensor | None]]:
        """The output (..., dim), and the gradients of x and of every weight, given the output's gradient."""
        rows, out = Rows(x, self.source), None
        grad = grad.reshape(-1, grad.shape[-1])
        leaves = [None if weight is None else weight.detach().requires_grad_() for weight in weights]
        given = [leaf for leaf in leaves if leaf is not None]
        sums = [torch.zeros_like(w, dtype=torch.promote_types(w.dtype, torch.float32)) for w in given]
        for part in rows.parts(self.chunk):
            with torch.enable_grad(), self.precision.restored():
                piece = rows.floats(part).detach().requires_grad_()
                y = self.branch(piece, leaves)
            out = _filled(out, part, y.detach(), rows.shape)
            with torch.autocast(y.device.type, enabled=False):  # as in any backward pass
                grad_y = moved(grad[part], y.device, y.dtype)
                grad_piece, *grad_weights = torch.autograd.grad(y, [piece, *given], grad_y)
            rows.add_gradients(part, grad_piece)
            for total, grad_weight in zip(sums, grad_weights, strict=True):
                total += grad_weight
        assert out is not None
        found = iter(sums)
        grads = [None if weight is None else next(found).to(weight.dtype) for weight in weights]
        return out.view(rows.shape), [rows.gradient(given[0].device), *grads]

    def branch(self, x: Tensor, weights: Sequence[Tensor | None]) -> Tensor:
        """Norm and feed-forward of some tokens (n, dim)."""
        weight, bias, *others = weights
        inner = cast("list[Tensor]", others)
        if weight is not None:
            x = norm(x, weight, bias, self.eps)
        return _feedforward(x, self.activation, *inner)


def _filled(out: Tensor | None, part: slice, y: Tensor, shape: Sequence[int]) -> Tensor:
    """`out` (tokens, dim), made when its dtype is known, with y in some of its rows."""
    if out is None:
        out = y.new_empty(math.prod(shape[:-1]), y.shape[-1])
    out[part] = y
    return out
