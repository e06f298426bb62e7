"""Cross-entropy from hidden states, in chunks: the logits of a long sequence are never in memory all at once.

One autograd.Function computes logits, loss and gradients of one chunk of tokens after the other. It saves for the
backward pass the gradients of the hidden states and of the weight, whose size does not depend on length · vocabulary.
The weight's gradient is returned once, summed: ZeRO 2 and 3 need that.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megabase.models.precision import Precision

IGNORE = -100
"""The label of a token that has no loss."""


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    weights: Tensor | None = None,
    chunk: int = 4096,
) -> Tensor:
    """Sum over tokens of weights · −log softmax(hidden @ weightᵀ + bias)[label], in nats.

    Products run in the precision of `hidden` and autocast, everything after them in fp32 (fp64 for fp64).

    Args:
        hidden: (..., dim).
        weight: (vocab, dim).
        labels: (...) int64; IGNORE for no loss.
        bias: (vocab,), None = 0.
        weights: (...) float, None = 1 everywhere.
        chunk: tokens whose logits are in memory at once.

    Returns:
        An fp32 scalar, differentiable with respect to hidden, weight and bias.

    Raises:
        ValueError: there is not one label for each hidden state.
    """
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"labels have shape {tuple(labels.shape)}, hidden states {tuple(hidden.shape)}: give one label each"
        )
    flat = None if weights is None else weights.reshape(-1)
    return _LinearCrossEntropy.apply(
        hidden.reshape(-1, hidden.shape[-1]), weight, bias, labels.reshape(-1), flat, chunk
    )


def log_probabilities(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """log softmax(hidden @ weightᵀ + bias), computed as in `linear_cross_entropy`.

    Args:
        hidden: (..., dim).
        weight: (vocab, dim).
        bias: (vocab,), None = 0.

    Returns:
        (..., vocab) fp32 (fp64 for fp64).
    """
    dtype = Precision.current(hidden.device).compute_dtype(hidden.dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        return _log_softmax(hidden.to(dtype), weight.to(dtype), bias)


def _log_softmax(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Products in the dtype of hidden and weight, everything after them in fp32, or fp64 where that is fp64."""
    logits = (hidden @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32))
    if bias is not None:
        logits += bias.to(logits.dtype)
    return logits.log_softmax(dim=-1)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        weights: Tensor | None,
        chunk: int,
    ) -> Tensor:
        dtype = Precision.current(hidden.device).compute_dtype(hidden.dtype)
        wide = torch.promote_types(dtype, torch.float32)
        matrix = weight.to(dtype)
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if need_weight else None
        grad_bias = torch.zeros_like(bias, dtype=wide) if bias is not None and need_bias else None
        total = torch.zeros((), dtype=wide, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, hidden.shape[0], chunk):
                part = slice(start, start + chunk)
                piece = hidden[part].to(dtype)
                scored = labels[part] != IGNORE
                target = labels[part].where(scored, 0)[:, None]
                scale = scored.to(wide) if weights is None else weights[part].to(wide).where(scored, 0.0)
                log_probs = _log_softmax(piece, matrix, bias)
                # where() instead of a product: a NaN at a token without loss must not reach the sum.
                nats = -log_probs.gather(1, target).squeeze(1) * scale
                total += nats.where(scored, 0.0).sum()
                if need_hidden or need_weight or need_bias:
                    grad = log_probs.exp_()
                    grad.scatter_add_(1, target, torch.full_like(target, -1.0, dtype=wide))
                    grad = (grad * scale[:, None]).where(scored[:, None], 0.0)
                    if grad_bias is not None:
                        grad_bias += grad.sum(dim=0)
                    grad = grad.to(dtype)
                    if grad_hidden is not None:
                        grad_hidden[part] = grad @ matrix
                    if grad_weight is not None:
                        grad_weight += grad.T @ piece
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grads[0].to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * grads[0]).to(ctx.weight_dtype)
        if grad_bias is not None:
            grad_bias = (grad_bias * grads[0]).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None
