"""The weights of a Reformer: their names in megabase and in transformers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from megabase.models.config import ConfigError, ReformerConfig
from megabase.models.huggingface.settings import PROJECTIONS


def weight_names(config: ReformerConfig, *, classifies: bool) -> dict[str, str]:
    """The name of every weight in megabase -> its name in transformers.

    Args:
        config: the settings of the model.
        classifies: whether it is a classifier; else it is a language model.
    """
    tokens = "reformer.embeddings.word_embeddings.weight"
    positions = "reformer.embeddings.position_embeddings"
    names = {"body.embedding.tokens.weight": tokens}
    if config.positions == "axial":
        names["body.embedding.positions.rows"] = f"{positions}.weights.0"
        names["body.embedding.positions.columns"] = f"{positions}.weights.1"
    else:
        names["body.embedding.positions.table"] = f"{positions}.embedding.weight"
    for i, kind in enumerate(config.pattern):
        block, layer = f"body.stack.blocks.{i}", f"reformer.encoder.layers.{i}"
        for part in ("weight", "bias"):
            names[f"{block}.f.norm.{part}"] = f"{layer}.attention.layer_norm.{part}"
            names[f"{block}.g.norm.{part}"] = f"{layer}.feed_forward.layer_norm.{part}"
        for name in PROJECTIONS[kind]:
            names[f"{block}.f.attention.{name}.weight"] = f"{layer}.attention.self_attention.{name}.weight"
        names[f"{block}.f.attention.output.weight"] = f"{layer}.attention.output.dense.weight"
        for name, other in (("inner", "dense"), ("outer", "output")):
            names[f"{block}.g.feedforward.{name}"] = f"{layer}.feed_forward.{other}.dense.weight"
            names[f"{block}.g.feedforward.{name}_bias"] = f"{layer}.feed_forward.{other}.dense.bias"
    for part in ("weight", "bias"):
        names[f"body.norm.{part}"] = f"reformer.encoder.layer_norm.{part}"
    if classifies:
        for name, other in (("dense", "dense"), ("output", "out_proj")):
            for part in ("weight", "bias"):
                names[f"head.{name}.{part}"] = f"classifier.{other}.{part}"
        return names
    names["head.weight"] = tokens if config.tie_embeddings else "lm_head.decoder.weight"
    if config.head_bias:
        names["head.bias"] = "lm_head.bias"
    return names


def check_names(found: Iterable[str], expected: Iterable[str]) -> None:
    """Raise ConfigError unless a model of transformers has the expected weights and no others, its head aside."""
    heads = {"lm_head.bias", "lm_head.decoder.weight"}
    other = sorted((set(found) ^ set(expected)) - heads)
    if other:
        raise ConfigError(
            f"{len(other)} weights differ from those of transformers' Reformer, for example {other[0]!r}: "
            "merge adapters and undo quantisation first"
        )


def untied_head(tokens: Tensor) -> Tensor:
    """The head (vocab, 2·dim) with the logits of a tied one: both streams are multiplied with the embedding.

    Args:
        tokens: the embedding, (vocab, dim).
    """
    return tokens.repeat(1, 2)


def load_copies(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Make copies of `weights`, in the model's shapes, the weights of the model.

    Raises:
        RuntimeError: they are not the weights that the model has.
    """
    shapes = {name: weight.shape for name, weight in model.state_dict().items()}
    copies = {name: weight.clone().reshape(shapes[name]) for name, weight in weights.items()}
    model.load_state_dict(copies, assign=True)
