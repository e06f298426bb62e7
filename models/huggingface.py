"""Weights and settings from and to the Reformer of `transformers` (5.x), which need not be installed.

    model = from_huggingface(ReformerModelWithLMHead.from_pretrained("google/reformer-enwik8"))
    to_huggingface(model).save_pretrained("out")

Both ways every weight is copied bit for bit, and the two models compute the same function: the paper's `chunk`
rules, with no rotary positions and no convolution. What the other side cannot say is refused by its name. That
leaves, on purpose:

- Hash rotations are each side's own (ours a function of Seeds, theirs of torch's generator or `hash_seed`). Given
  the same buckets, LSH layers agree.
- Dropout has the same rates, but not all of the same places: theirs drops within the feed-forward and behind the
  last norm too, and whole rows of axial positions. Without dropout gradients agree as well.
- Padding takes part in their ring. Where a sequence has a whole chunk of it, the first chunk (of a round of LSH,
  of a bidirectional local layer) looks back at padding; ours looks back at the last chunk of real tokens.
- `lm_head.bias`: transformers 4 added it to the logits, 5 (seen: 5.23) keeps it and does not; ours does
  (`head_bias`). Where it is not zero there is a warning, since logits differ by it.
- A tied head of ours becomes one of its own with the same logits, since theirs cannot be tied: it is twice as
  wide as the embedding. Coming back it is tied again, unless it was trained apart.

Settings that only one side has do not get lost on the way there and back. Theirs (token ids, names of labels,
`initializer_range`, ...) stay on the model that `from_huggingface` returns, though not in its state dict. Ours
(`loss_chunk`, `residual`, ...) go into their config.json under the key `megabase`, where they count as long as
they still describe that model.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields, is_dataclass, replace
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from megabase.models.attention.lsh import bucket_factors
from megabase.models.config import ConfigError, FeedForwardConfig, LocalConfig, LSHConfig, ReformerConfig
from megabase.models.reformer import FirstTokenHead, Reformer, ReformerClassifier

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers import ReformerConfig as TheirConfig

OURS = "megabase"
"""Where their config holds the settings of ours that it has no words for."""

THEIRS = "huggingface_settings"
"""Where a model of ours holds the settings of theirs that it has no words for."""

PROJECTIONS = {"local": ("query", "key", "value"), "lsh": ("query_key", "value")}
"""The kinds of attention that both sides have, and what their projections are called there."""


def from_huggingface(model: PreTrainedModel) -> Reformer | ReformerClassifier:
    """Our model with the weights (copied: dtype, device, training mode) and settings of a model of transformers.

    ReformerModelWithLMHead and ReformerForMaskedLM give a Reformer, ReformerForSequenceClassification a
    ReformerClassifier. Raises ConfigError for another model, a setting that ours cannot express, and if
    transformers is missing.
    """
    library = _transformers()
    classifies = isinstance(model, library.ReformerForSequenceClassification)
    if not classifies and not isinstance(
        model, (library.ReformerModelWithLMHead, library.ReformerForMaskedLM)
    ):
        raise ConfigError(
            f"from_huggingface cannot take a {type(model).__name__}: give it a ReformerModelWithLMHead, "
            "ReformerForMaskedLM or ReformerForSequenceClassification"
        )
    config = _our_config(model)
    # On the meta device nothing is drawn or allocated: the copies below become the weights.
    with torch.device("meta"):
        ours = ReformerClassifier(config, model.config.num_labels) if classifies else Reformer(config)
    theirs = model.state_dict()
    names = _names(config, classifies=classifies)
    _check_names(theirs, names.values())
    _load(ours, {name: theirs[other] for name, other in names.items()})
    if isinstance(ours, Reformer) and config.tie_embeddings:
        ours.head.weight = ours.body.embedding.tokens.weight
    _warn_of_bias(model, config)
    setattr(ours, THEIRS, model.config.to_dict())
    return ours.train(model.training)


def to_huggingface(model: Reformer | ReformerClassifier) -> PreTrainedModel:
    """The model of transformers with the weights (copied: dtype, device, training mode) and settings of ours.

    A Reformer gives a ReformerModelWithLMHead, or a ReformerForMaskedLM where not causal; a ReformerClassifier a
    ReformerForSequenceClassification. Raises ConfigError for a setting that theirs cannot express, and if
    transformers is missing.
    """
    library = _transformers()
    if not isinstance(model, (Reformer, ReformerClassifier)):
        raise ConfigError(
            f"to_huggingface cannot take a {type(model).__name__}: transformers' Reformer is a language model "
            "or a classifier"
        )
    config = model.body.config
    classes = _classes(model)
    settings = _all_their_settings(config, getattr(model, THEIRS, {}), classes)
    if classes:
        kind = library.ReformerForSequenceClassification
    else:
        kind = library.ReformerModelWithLMHead if config.causal else library.ReformerForMaskedLM
    with torch.random.fork_rng(devices=[]):
        theirs = kind(library.ReformerConfig.from_dict(settings))
    ours = model.state_dict()
    weights = {other: ours[name] for name, other in _names(config, classifies=bool(classes)).items()}
    if not classes:
        head = ours["head.weight"]
        if config.tie_embeddings:
            weights["lm_head.decoder.weight"] = _widened(head)
        weights.setdefault("lm_head.bias", torch.zeros_like(head[:, 0]))
    _load(theirs, weights)
    theirs.to(next(model.parameters()).device)
    if _our_config(theirs) != config:
        setattr(theirs.config, OURS, asdict(config))
    _warn_of_bias(theirs, config)
    return theirs.train(model.training)


def _transformers() -> ModuleType:
    try:
        import transformers
    except ImportError as error:
        raise ConfigError(
            "megabase.models.huggingface needs transformers 5: pip install 'transformers>=5,<6'"
        ) from error
    return transformers


# Settings


def _our_config(model: PreTrainedModel) -> ReformerConfig:
    """Our config of their model: the one that lies in its config if that still describes it, else read anew."""
    config = _saved_config(model.config) or _read_config(model.config)
    theirs = model.state_dict()
    if "lm_head.bias" in theirs:
        words, head = theirs["reformer.embeddings.word_embeddings.weight"], theirs["lm_head.decoder.weight"]
        tied = config.tie_embeddings and torch.equal(head, _widened(words))
        biased = config.head_bias or bool(theirs["lm_head.bias"].any())
        config = replace(config, tie_embeddings=tied, head_bias=biased)
    else:
        config = replace(config, classifier="first")
    config.validate()
    return config


def _saved_config(theirs: TheirConfig) -> ReformerConfig | None:
    """What to_huggingface put into their config, unless that was changed since, or by another version of ours."""
    values = getattr(theirs, OURS, None)
    if values is None:
        return None
    base = ReformerConfig()
    parts = {f.name: getattr(base, f.name) for f in fields(base)}
    found = theirs.to_dict()
    try:
        config = replace(
            base,
            **{
                name: replace(parts[name], **value) if is_dataclass(parts.get(name)) else value
                for name, value in values.items()
            },
        )
        settings = _their_settings(config, found)
    except (TypeError, ConfigError):
        return None
    return config if all(found[key] == value for key, value in settings.items()) else None


def _read_config(theirs: TheirConfig) -> ReformerConfig:
    """Our words for the settings of theirs. Raises ConfigError, naming theirs."""
    layers = list(theirs.attn_layers)
    period = next(
        n for n in range(1, len(layers) + 1) if all(x == layers[i % n] for i, x in enumerate(layers))
    )
    _check_theirs(theirs, layers)
    local, lsh, rate = LocalConfig(attend="chunk"), LSHConfig(attend="chunk"), 0.0
    if "lsh" in layers:
        rate = theirs.lsh_attention_probs_dropout_prob
        lsh.rounds, lsh.chunk_length = theirs.num_hashes, theirs.lsh_attn_chunk_length
        lsh.n_buckets = _bucket_count(theirs.to_dict())
    if "local" in layers:
        rate = theirs.local_attention_probs_dropout_prob
        local.window = theirs.local_attn_chunk_length
        if "lsh" in layers and theirs.lsh_attention_probs_dropout_prob != rate:
            lsh.dropout = theirs.lsh_attention_probs_dropout_prob
    heads, width = theirs.num_attention_heads, theirs.attention_head_size
    return ReformerConfig(
        vocab_size=theirs.vocab_size,
        dim=theirs.hidden_size,
        depth=len(layers),
        heads=heads,
        head_dim=None if heads * width == theirs.hidden_size else width,
        layers=layers[:period],
        causal=theirs.is_decoder,
        max_length=theirs.max_position_embeddings,
        positions="axial" if theirs.axial_pos_embds else "learned",
        axial_shape=list(theirs.axial_pos_shape) if theirs.axial_pos_embds else [],
        axial_dims=list(theirs.axial_pos_embds_dim) if theirs.axial_pos_embds else [],
        norm_eps=theirs.layer_norm_eps,
        dropout=theirs.hidden_dropout_prob,
        attention_dropout=rate,
        conv=0,
        lsh=lsh,
        local=local,
        feedforward=FeedForwardConfig(
            mult=theirs.feed_forward_size / theirs.hidden_size, activation=theirs.hidden_act
        ),
    )


def _check_theirs(theirs: TheirConfig, layers: list[str]) -> None:
    def refuse(key: str, way_out: str) -> None:
        raise ConfigError(
            f"transformers' {key}={getattr(theirs, key)!r} has no counterpart in models.Reformer: {way_out}"
        )

    for kind in sorted(set(layers)):
        for key, only in ((f"{kind}_num_chunks_before", 1), (f"{kind}_num_chunks_after", 0)):
            if getattr(theirs, key) != only:
                refuse(key, f"only {only} is known (own and previous chunk)")
        if getattr(theirs, f"{kind}_attn_chunk_length") is None:
            refuse(f"{kind}_attn_chunk_length", "give the length of a chunk")
    if theirs.hidden_act not in ("relu", "gelu"):
        refuse("hidden_act", "only 'relu' and 'gelu' are known")
    if theirs.classifier_dropout not in (None, theirs.hidden_dropout_prob):
        refuse("classifier_dropout", f"only hidden_dropout_prob={theirs.hidden_dropout_prob} is known there")
    if theirs.axial_pos_embds:
        if len(theirs.axial_pos_shape) != 2:
            refuse("axial_pos_shape", "only two axes are known")
        if theirs.max_position_embeddings > math.prod(theirs.axial_pos_shape):
            holds = math.prod(theirs.axial_pos_shape)
            refuse("max_position_embeddings", f"axial_pos_shape holds {holds} positions; set it to that")


def _all_their_settings(config: ReformerConfig, kept: Mapping[str, Any], classes: int) -> dict[str, Any]:
    """Their settings for `config`, and of the others those that were kept."""
    settings = {key: value for key, value in kept.items() if key != OURS}
    settings |= _their_settings(config, settings)
    if classes and classes != len(settings.get("id2label", ())):
        settings.pop("id2label", None)
        settings.pop("label2id", None)
        settings["num_labels"] = classes
    return settings


def _their_settings(config: ReformerConfig, kept: Mapping[str, Any]) -> dict[str, Any]:
    """Their words for the settings of ours. Raises ConfigError, naming ours.

    kept: their settings as they were; what still says the same stays in the same words.
    """
    check_ours(config)
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


def check_ours(config: ReformerConfig) -> None:
    """Raise ConfigError for a setting of a language model that theirs cannot express."""
    for kind in sorted(set(config.pattern) - set(PROJECTIONS)):
        raise ConfigError(f"transformers' Reformer has no {kind!r} layers (model.layers): take local and lsh")
    lsh, local = "lsh" in config.pattern, "local" in config.pattern
    for key, value, known, matters in (
        ("positions", config.positions, ("axial", "learned"), True),
        ("norm", config.norm, ("layer",), True),
        ("conv", config.conv, (0,), True),
        ("feedforward.activation", config.feedforward.activation, ("relu", "gelu"), True),
        ("local.attend", config.local.attend, ("chunk",), local),
        ("lsh.attend", config.lsh.attend, ("chunk",), lsh),
        ("lsh.duplicates", config.lsh.duplicates, ("average",), lsh),
    ):
        if matters and value not in known:
            raise ConfigError(
                f"model.{key}={value} has no counterpart in transformers' Reformer, which knows only "
                f"{' and '.join(map(str, known))}: only a model trained with that can go there"
            )


def _bucket_count(theirs: Mapping[str, Any]) -> int:
    """Buckets of a round by their settings. None there is filled in by the first sequence; here, by the longest:
    2 · length / chunk length, down to a power of two."""
    buckets = theirs["num_buckets"]
    if buckets is None:
        chunks = max(1, theirs["max_position_embeddings"] // theirs["lsh_attn_chunk_length"])
        return 1 << (2 * chunks).bit_length() - 1
    return buckets if isinstance(buckets, int) else math.prod(buckets)


# Weights


def _names(config: ReformerConfig, *, classifies: bool) -> dict[str, str]:
    """Our name of every weight -> theirs."""
    words = "reformer.embeddings.word_embeddings.weight"
    places = "reformer.embeddings.position_embeddings"
    names = {"body.embedding.tokens.weight": words}
    if config.positions == "axial":
        names["body.embedding.positions.rows"] = f"{places}.weights.0"
        names["body.embedding.positions.columns"] = f"{places}.weights.1"
    else:
        names["body.embedding.positions.table"] = f"{places}.embedding.weight"
    for i, kind in enumerate(config.pattern):
        ours, theirs = f"body.stack.blocks.{i}", f"reformer.encoder.layers.{i}"
        for part in ("weight", "bias"):
            names[f"{ours}.f.norm.{part}"] = f"{theirs}.attention.layer_norm.{part}"
            names[f"{ours}.g.norm.{part}"] = f"{theirs}.feed_forward.layer_norm.{part}"
        for name in PROJECTIONS[kind]:
            names[f"{ours}.f.attention.{name}.weight"] = f"{theirs}.attention.self_attention.{name}.weight"
        names[f"{ours}.f.attention.output.weight"] = f"{theirs}.attention.output.dense.weight"
        for name, other in (("inner", "dense"), ("outer", "output")):
            names[f"{ours}.g.feedforward.{name}"] = f"{theirs}.feed_forward.{other}.dense.weight"
            names[f"{ours}.g.feedforward.{name}_bias"] = f"{theirs}.feed_forward.{other}.dense.bias"
    for part in ("weight", "bias"):
        names[f"body.norm.{part}"] = f"reformer.encoder.layer_norm.{part}"
    if classifies:
        for name, other in (("dense", "dense"), ("output", "out_proj")):
            for part in ("weight", "bias"):
                names[f"head.{name}.{part}"] = f"classifier.{other}.{part}"
        return names
    names["head.weight"] = words if config.tie_embeddings else "lm_head.decoder.weight"
    if config.head_bias:
        names["head.bias"] = "lm_head.bias"
    return names


def _check_names(theirs: Iterable[str], wanted: Iterable[str]) -> None:
    """Raise ConfigError unless their model has the weights that are wanted and no others."""
    heads = {"lm_head.bias", "lm_head.decoder.weight"}
    other = sorted((set(theirs) ^ set(wanted)) - heads)
    if other:
        raise ConfigError(
            f"weight {other[0]!r} ({len(other)} such) is not as in transformers' Reformer: "
            "merge adapters and undo quantisation first"
        )


def _widened(words: Tensor) -> Tensor:
    """The head (vocab, 2·dim) that does what a tied one does: both streams meet the embedding (vocab, dim)."""
    return words.repeat(1, 2)


def _classes(model: Reformer | ReformerClassifier) -> int:
    """Classes of a classifier; 0 for a language model. Raises ConfigError for a head that theirs is not."""
    if isinstance(model, Reformer):
        return 0
    if not isinstance(model.head, FirstTokenHead):
        raise ConfigError(
            "model.classifier=mean has no counterpart in transformers' Reformer, whose classifier takes the "
            "first token: only a model trained with model.classifier=first can go there"
        )
    return model.head.output.out_features


def _warn_of_bias(theirs: PreTrainedModel, config: ReformerConfig) -> None:
    head = getattr(theirs, "lm_head", None)
    if config.head_bias and head is not None and head.decoder.bias is None and head.bias.any():
        warnings.warn(
            f"{type(theirs).__name__}.lm_head.bias is not zero, and this version of transformers does not add it "
            "to its logits (version 4 did): they differ by it from those of models.Reformer, which does",
            stacklevel=3,
        )


def _load(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Make copies of `weights` the model's own, in its shapes. Raises RuntimeError unless they are all it has."""
    shapes = {name: weight.shape for name, weight in model.state_dict().items()}
    copies = {name: weight.clone().reshape(shapes[name]) for name, weight in weights.items()}
    model.load_state_dict(copies, assign=True)
