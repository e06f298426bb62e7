"""The parameters of a model by part, counted from the settings alone, without torch.

A test compares the counts with the models themselves, for all kinds of layers and settings.
"""

from __future__ import annotations

from megabase.models.config import ReformerConfig
from megabase.pipeline.readable import counted

_FEEDFORWARD = "feed-forward"


def count_parameters(config: ReformerConfig) -> dict[str, int]:
    """Parameters of a Reformer by part, in the order in which a token meets them; a tied weight counts once.

    Args:
        config: of the model; `vocab_size` is set.
    """
    return {part: sum(sizes) for part, sizes in tensor_sizes(config).items()}


def tensor_sizes(config: ReformerConfig) -> dict[str, list[int]]:
    """The sizes of a model's tensors of parameters, by the parts of `count_parameters`."""
    assert config.vocab_size is not None, "validated"
    sizes = {"embedding": [config.vocab_size * config.dim, *_positions(config)]}
    for kind in dict.fromkeys(config.pattern):
        layers = config.pattern.count(kind)
        sizes[f"{kind} attention ({counted(layers, 'layer')})"] = layers * _attention(config, kind)
    sizes[_FEEDFORWARD] = config.depth * _feedforward(config)
    head = [] if config.tie_embeddings else [2 * config.dim * config.vocab_size]
    bias = [config.vocab_size] if config.head_bias else []
    sizes["output"] = [*_norm(config, 2 * config.dim), *head, *bias]
    return sizes


def small_parameters(config: ReformerConfig, limit: int) -> int:
    """Parameters in tensors of at most `limit` elements."""
    return sum(size for sizes in tensor_sizes(config).values() for size in sizes if size <= limit)


def _attention(config: ReformerConfig, kind: str) -> list[int]:
    """One attention branch: norm, convolution, projections, and what the kind adds."""
    inner = config.heads * config.width
    projections = 3 if kind == "lsh" else 4  # queries and keys are one in lsh layers
    sizes = [*_norm(config, config.dim), *projections * [config.dim * inner]]
    if config.conv:
        sizes.append(config.conv * config.dim)
    if config.looks_ahead(kind):
        sizes.append(2 * config.heads)
    if kind == "linformer":
        assert config.max_length is not None, "validated"
        heads = config.heads if config.linformer.share == "none" else 1
        sets = 1 if config.linformer.share == "keyvalue" else 2
        sizes += sets * [heads * config.linformer.size * config.max_length]
    return sizes


def _feedforward(config: ReformerConfig) -> list[int]:
    """One feed-forward branch: norm, two linear maps with biases."""
    wide = config.hidden * (2 if config.feedforward.activation == "swiglu" else 1)
    return [*_norm(config, config.dim), wide * config.dim, wide, config.dim * config.hidden, config.dim]


def _norm(config: ReformerConfig, width: int) -> list[int]:
    return [width, width] if config.norm == "layer" else [width]


def _positions(config: ReformerConfig) -> list[int]:
    if config.positions == "learned":
        assert config.max_length is not None, "validated"
        return [config.max_length * config.dim]
    if config.positions == "axial":
        return [size * width for size, width in zip(config.axial, config.axial_widths, strict=True)]
    return []
