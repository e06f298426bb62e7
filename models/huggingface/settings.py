"""The settings of a Reformer, from megabase's config to transformers' and back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from megabase.models.config import ConfigError, FeedForwardConfig, LocalConfig, LSHConfig, ReformerConfig
from megabase.models.layer_config import bucket_factors

if TYPE_CHECKING:
    from transformers import ReformerConfig as HuggingFaceConfig

MEGABASE_KEY = "megabase"
"""The key in transformers' config under which megabase's own settings are saved."""

PROJECTIONS = {"local": ("query", "key", "value"), "lsh": ("query_key", "value")}
"""The kinds of attention that both sides have, with the names of their projections, which are the same."""


def saved_settings(source: HuggingFaceConfig) -> ReformerConfig | None:
    """The config that to_huggingface saved in transformers' config.

    Returns:
        The config. None if no config was saved, if the settings of transformers were changed since, or if another
        version of megabase saved settings that this one does not know.
    """
    saved = getattr(source, MEGABASE_KEY, None)
    if not isinstance(saved, Mapping):
        return None
    found = source.to_dict()
    try:
        config = ReformerConfig.from_dict(saved)
        settings = _convert(config, found)
    except ConfigError:
        return None
    return config if all(found[key] == value for key, value in settings.items()) else None


def read_settings(source: HuggingFaceConfig) -> ReformerConfig:
    """Convert transformers' config. Raises ConfigError for a setting that megabase does not have."""
    layers = list(source.attn_layers)
    period = next(
        n for n in range(1, len(layers) + 1) if all(x == layers[i % n] for i, x in enumerate(layers))
    )
    _check_source(source, layers)
    local, lsh, rate = LocalConfig(attend="chunk"), LSHConfig(attend="chunk"), 0.0
    if "lsh" in layers:
        rate = source.lsh_attention_probs_dropout_prob
        lsh.rounds, lsh.chunk_length = source.num_hashes, source.lsh_attn_chunk_length
        lsh.n_buckets = _bucket_count(source.to_dict())
    if "local" in layers:
        rate = source.local_attention_probs_dropout_prob
        local.window = source.local_attn_chunk_length
        if "lsh" in layers and source.lsh_attention_probs_dropout_prob != rate:
            lsh.dropout = source.lsh_attention_probs_dropout_prob
    heads, width = source.num_attention_heads, source.attention_head_size
    return ReformerConfig(
        vocab_size=source.vocab_size,
        dim=source.hidden_size,
        depth=len(layers),
        heads=heads,
        head_dim=None if heads * width == source.hidden_size else width,
        layers=layers[:period],
        causal=source.is_decoder,
        max_length=source.max_position_embeddings,
        positions="axial" if source.axial_pos_embds else "learned",
        axial_shape=list(source.axial_pos_shape) if source.axial_pos_embds else [],
        axial_dims=list(source.axial_pos_embds_dim) if source.axial_pos_embds else [],
        norm_eps=source.layer_norm_eps,
        dropout=source.hidden_dropout_prob,
        attention_dropout=rate,
        conv=0,
        head_bias=False,
        lsh=lsh,
        local=local,
        feedforward=FeedForwardConfig(
            mult=source.feed_forward_size / source.hidden_size, activation=source.hidden_act
        ),
    )


def to_settings(config: ReformerConfig, kept: Mapping[str, Any], classes: int) -> dict[str, Any]:
    """The settings of transformers for a model of megabase.

    Args:
        config: the settings of the model.
        kept: the settings that the model had in transformers, if it was converted from there; else empty. A setting
            that means the same as `config` keeps its value, and so does one that megabase does not have.
        classes: number of classes of a classifier; 0 for a language model.

    Raises:
        ConfigError: transformers does not have a setting of `config`.
    """
    settings = {key: value for key, value in kept.items() if key != MEGABASE_KEY}
    settings |= _convert(config, settings)
    if classes and classes != len(settings.get("id2label", ())):
        settings.pop("id2label", None)
        settings.pop("label2id", None)
        settings["num_labels"] = classes
    return settings


def check_convertible(config: ReformerConfig) -> None:
    """Raise ConfigError for a setting of a language model that transformers' Reformer does not have."""
    for kind in sorted(set(config.pattern) - set(PROJECTIONS)):
        raise ConfigError(f"transformers' Reformer has no {kind!r} layers (model.layers): take local and lsh")
    lsh, local = "lsh" in config.pattern, "local" in config.pattern
    unknown, instead = [], []
    for key, value, known, matters in (
        ("positions", config.positions, ("learned", "axial"), True),
        ("norm", config.norm, ("layer",), True),
        ("conv", config.conv, (0,), True),
        ("feedforward.activation", config.feedforward.activation, ("gelu", "relu"), True),
        ("local.attend", config.local.attend, ("chunk",), local),
        ("lsh.attend", config.lsh.attend, ("chunk",), lsh),
        ("lsh.duplicates", config.lsh.duplicates, ("average",), lsh),
    ):
        if matters and value not in known:
            unknown.append(f"model.{key}={value}")
            instead.append(f"model.{key}={known[0]}")
    if unknown:
        raise ConfigError(
            f"transformers' Reformer has no counterpart of {', '.join(unknown)}: retrain with {' '.join(instead)}"
        )


def _convert(config: ReformerConfig, kept: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of transformers that follow from `config`; see to_settings. Raises ConfigError."""
    check_convertible(config)
    settings: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "attn_layers": config.pattern,
        "num_attention_heads": config.heads,
        "attention_head_size": config.width,
        "feed_forward_size": config.hidden,
        "hidden_act": config.feedforward.activation,
        "hidden_dropout_prob": config.dropout,
        "is_decoder": config.causal,
        "layer_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_length,
        "axial_pos_embds": config.positions == "axial",
    }
    if config.positions == "axial":
        settings |= {
            "axial_pos_shape": list(config.axial),
            "axial_pos_embds_dim": list(config.axial_widths),
        }
    if "local" in config.pattern:
        settings |= {
            "local_attn_chunk_length": config.local.window,
            "local_num_chunks_before": 1,
            "local_num_chunks_after": 0,
            "local_attention_probs_dropout_prob": config.attention_rate("local"),
        }
    if "lsh" in config.pattern:
        settings |= {
            "num_hashes": config.lsh.rounds,
            "lsh_attn_chunk_length": config.lsh.chunk_length,
            "lsh_num_chunks_before": 1,
            "lsh_num_chunks_after": 0,
            "lsh_attention_probs_dropout_prob": config.attention_rate("lsh"),
        }
        factors = bucket_factors(config.buckets)
        settings["num_buckets"] = factors if len(factors) > 1 else config.buckets
        if "num_buckets" in kept:
            same = settings | {"num_buckets": kept["num_buckets"]}
            settings = same if _bucket_count(same) == config.buckets else settings
    return settings


def _bucket_count(settings: Mapping[str, Any]) -> int:
    """Buckets of a round, from the settings of transformers.

    transformers replaces num_buckets=None by 2 · length / chunk length, rounded down to a power of two, when it gets
    its first sequence. Here the length is that of the longest sequence.
    """
    buckets = settings["num_buckets"]
    if buckets is None:
        chunks = max(1, settings["max_position_embeddings"] // settings["lsh_attn_chunk_length"])
        return 1 << (2 * chunks).bit_length() - 1
    return buckets if isinstance(buckets, int) else math.prod(buckets)


def _check_source(source: HuggingFaceConfig, layers: list[str]) -> None:
    """Raise ConfigError for a setting of transformers that megabase does not have."""

    def refuse(key: str, advice: str) -> None:
        value = getattr(source, key)
        raise ConfigError(
            f"transformers' {key}={value!r} has no counterpart in megabase's Reformer: {advice}"
        )

    for kind in sorted(set(layers)):
        for key, only in ((f"{kind}_num_chunks_before", 1), (f"{kind}_num_chunks_after", 0)):
            if getattr(source, key) != only:
                refuse(key, f"only {only} is known (own and previous chunk)")
        if getattr(source, f"{kind}_attn_chunk_length") is None:
            refuse(f"{kind}_attn_chunk_length", "give the length of a chunk")
    if source.hidden_act not in ("relu", "gelu"):
        refuse("hidden_act", "only 'relu' and 'gelu' are known")
    if source.classifier_dropout not in (None, source.hidden_dropout_prob):
        refuse("classifier_dropout", f"only hidden_dropout_prob={source.hidden_dropout_prob} is known")
    if source.axial_pos_embds:
        if len(source.axial_pos_shape) != 2:
            refuse("axial_pos_shape", "only two axes are known")
        if source.max_position_embeddings > math.prod(source.axial_pos_shape):
            size = math.prod(source.axial_pos_shape)
            refuse("max_position_embeddings", f"axial_pos_shape holds {size} positions; set it to that")
