"""Floating-point operations (FLOPs), counted from shapes: for MFU and HFU.

Matrix products and convolutions count, a multiply-add as two. Norms, softmax, sorting and the look-up of embeddings do
not. Attention counts the pairs of query and key that its rule allows (or the features or slots that take their place),
not the further pairs that a kernel may compute.

A training step does 3 times the work of a forward pass, because the backward pass does twice the work of the
forward pass: MFU counts that. The reversible stack runs the forward pass once more: HFU counts that too.
"""

from __future__ import annotations

from megabase.models.config import ReformerConfig
from megabase.models.layer_config import bucket_factors


def flops_per_token(config: ReformerConfig, length: int) -> float:
    """FLOPs of the forward pass for one token of a sequence of `length` tokens."""
    layers = sum(attention_flops(config, kind, length) for kind in config.pattern)
    return layers + config.depth * feedforward_flops(config) + head_flops(config)


def training_flops_per_token(config: ReformerConfig, length: int) -> tuple[float, float]:
    """FLOPs of forward and backward pass for one token of a sequence of `length` tokens.

    Returns:
        Those of the model, for MFU, and those that the reversible stack runs, for HFU.
    """
    forward = flops_per_token(config, length)
    return 3.0 * forward, 4.0 * forward - head_flops(config)


def attention_flops(config: ReformerConfig, kind: str, length: int) -> float:
    """FLOPs per token of one attention branch of a kind: convolution, projections, hashing or features, attention."""
    inner = config.heads * config.width
    projections = 3 if kind == "lsh" else 4
    flops = 2.0 * config.conv * config.dim + 2.0 * projections * config.dim * inner
    if kind == "lsh":
        rotations = sum(factor // 2 for factor in bucket_factors(config.buckets))
        flops += 2.0 * config.lsh.rounds * inner * rotations
    if kind == "linformer":  # keys and values, along the length
        flops += 4.0 * config.linformer.size * inner
    if kind == "performer":  # of queries and keys
        flops += 4.0 * config.performer.features * inner
    return flops + 4.0 * inner * keys_per_query(config, kind, length)


def feedforward_flops(config: ReformerConfig) -> float:
    """FLOPs per token of one feed-forward branch."""
    matrices = 3 if config.feedforward.activation == "swiglu" else 2
    return 2.0 * matrices * config.dim * config.hidden


def head_flops(config: ReformerConfig) -> float:
    """FLOPs per token of the logits."""
    assert config.vocab_size is not None, "validated"
    return 2.0 * config.vocab_size * config.dim * (1 if config.tie_embeddings else 2)


def keys_per_query(config: ReformerConfig, kind: str, length: int) -> float:
    """How many keys a query attends to, on average over a sequence of `length` tokens.

    For LSH attention this is the upper limit, with full buckets. Linformer's slots and Performer's features count as
    keys, because the arithmetic of one is that of a key.
    """
    if kind == "full":
        return (length + 1) / 2 if config.causal else float(length)
    if kind == "linformer":
        return float(config.linformer.size)
    if kind == "performer":
        return float(config.performer.features)
    if kind == "lsh":
        sides = 2 if config.lsh.attend == "chunk" or not config.causal else 1
        return config.lsh.rounds * float(min(sides * config.lsh.chunk_length, length))
    if config.local.attend == "chunk":
        return float(min(2 * config.local.window, length))
    before = _mean_window(config.local.window, length)
    return before if config.causal else 2 * before - 1


def _mean_window(window: int, length: int) -> float:
    """Mean over positions i of min(i + 1, window)."""
    window = min(window, length)
    return window - window * (window - 1) / (2 * length)
