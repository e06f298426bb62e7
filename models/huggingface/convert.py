"""Convert a Reformer from and to the one of `transformers` (5.x).

    model = from_huggingface(ReformerModelWithLMHead.from_pretrained("google/reformer-enwik8"))
    to_huggingface(model).save_pretrained("out")

Both ways every weight is copied bit for bit, and the two models compute the same function: the paper's `chunk`
rules, without rotary positions and without convolution. A setting that the other side does not have is refused by
name. Some differences remain:

- Hash rotations: megabase derives them from `Seeds`, transformers draws them from torch's generator or `hash_seed`.
  Given the same buckets, LSH layers agree.
- Dropout has the same rates, but transformers has it in more places: within the feed-forward, after the last norm, and
  on whole rows of axial positions. Without dropout the gradients agree as well.
- Padding: in transformers the first chunk of a round of LSH, or of a bidirectional local layer, attends to the last
  chunk of the padded sequence. In megabase it attends to the last chunk of real tokens. So the models differ where a
  whole chunk is padding.
- `lm_head.bias`: transformers 4 added it to the logits; 5 (checked with 5.23) has the weight but does not add it.
  megabase adds it (`head_bias`). If it is not zero, logits differ by it, and the conversion warns.
- Tied heads: the head of transformers reads both streams, so it is twice as wide as the embedding and cannot be tied to
  it. A tied head of megabase becomes a separate head with the same logits. On the way back it is tied again, unless
  training has changed it.

Settings that only one side has survive the way there and back. Those of transformers (token ids, names of labels,
`initializer_range`, ...) are kept on the model that `from_huggingface` returns, though not in its state dict. Those of
megabase (`loss_chunk`, `residual`, ...) go into transformers' config.json under the key `megabase`; they are used if
the settings of transformers still agree with them.
"""

from __future__ import annotations

import warnings
from dataclasses import asdict, replace
from types import ModuleType
from typing import TYPE_CHECKING

import torch

from megabase.models.classifier import FirstTokenHead, ReformerClassifier
from megabase.models.config import ConfigError, ReformerConfig
from megabase.models.huggingface.settings import (
    MEGABASE_KEY,
    read_settings,
    saved_settings,
    to_settings,
)
from megabase.models.huggingface.weights import check_names, load_copies, untied_head, weight_names
from megabase.models.reformer import Reformer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KEPT_SETTINGS = "huggingface_settings"
"""The attribute of a converted Reformer that keeps the settings of transformers, a dictionary."""


def from_huggingface(model: PreTrainedModel) -> Reformer | ReformerClassifier:
    """Convert a Reformer of transformers.

    Args:
        model: a ReformerModelWithLMHead or ReformerForMaskedLM, which become a Reformer, or a
            ReformerForSequenceClassification, which becomes a ReformerClassifier.

    Returns:
        A model with copies of the weights, of the same dtype, on the same device and in the same training mode.

    Raises:
        ConfigError: the model is of another class, has a setting that megabase does not have, or transformers is not
            installed.
    """
    library = _import_transformers()
    classifies = isinstance(model, library.ReformerForSequenceClassification)
    if not classifies and not isinstance(
        model, (library.ReformerModelWithLMHead, library.ReformerForMaskedLM)
    ):
        raise ConfigError(
            f"from_huggingface cannot convert a {type(model).__name__}: give it a ReformerModelWithLMHead, "
            "ReformerForMaskedLM or ReformerForSequenceClassification"
        )
    config = _config_of(model)
    # On the meta device nothing is drawn or allocated: the copies below become the weights.
    with torch.device("meta"):
        converted = ReformerClassifier(config, model.config.num_labels) if classifies else Reformer(config)
    weights = model.state_dict()
    names = weight_names(config, classifies=classifies)
    check_names(weights, names.values())
    load_copies(converted, {name: weights[other] for name, other in names.items()})
    if isinstance(converted, Reformer) and config.tie_embeddings:
        converted.head.weight = converted.body.embedding.tokens.weight
    _warn_of_bias(model, config)
    setattr(converted, KEPT_SETTINGS, model.config.to_dict())
    return converted.train(model.training)


def to_huggingface(model: Reformer | ReformerClassifier) -> PreTrainedModel:
    """Convert a Reformer of megabase.

    Args:
        model: a causal Reformer, which becomes a ReformerModelWithLMHead, a bidirectional one, which becomes a
            ReformerForMaskedLM, or a ReformerClassifier, which becomes a ReformerForSequenceClassification.

    Returns:
        A model with copies of the weights, of the same dtype, on the same device and in the same training mode.

    Raises:
        ConfigError: the model is of another class, has a setting that transformers does not have, or transformers is
            not installed.
    """
    library = _import_transformers()
    if not isinstance(model, (Reformer, ReformerClassifier)):
        raise ConfigError(
            f"to_huggingface cannot convert a {type(model).__name__}: transformers' Reformer is a language model "
            "or a classifier"
        )
    config = model.body.config
    classes = _classes(model)
    settings = to_settings(config, getattr(model, KEPT_SETTINGS, {}), classes)
    if classes:
        kind = library.ReformerForSequenceClassification
    else:
        kind = library.ReformerModelWithLMHead if config.causal else library.ReformerForMaskedLM
    with torch.random.fork_rng(devices=[]):
        converted = kind(library.ReformerConfig.from_dict(settings))
    state = model.state_dict()
    weights = {other: state[name] for name, other in weight_names(config, classifies=bool(classes)).items()}
    if not classes:
        head = state["head.weight"]
        if config.tie_embeddings:
            weights["lm_head.decoder.weight"] = untied_head(head)
        weights.setdefault("lm_head.bias", torch.zeros_like(head[:, 0]))
    load_copies(converted, weights)
    converted.to(next(model.parameters()).device)
    if _config_of(converted) != config:
        setattr(converted.config, MEGABASE_KEY, asdict(config))
    _warn_of_bias(converted, config)
    return converted.train(model.training)


def _import_transformers() -> ModuleType:
    try:
        import transformers
    except ImportError as error:
        raise ConfigError(
            "megabase.models.huggingface needs transformers 5: pip install 'transformers>=5,<6'"
        ) from error
    return transformers


def _config_of(model: PreTrainedModel) -> ReformerConfig:
    """The settings of megabase for a model of transformers. Raises ConfigError."""
    config = saved_settings(model.config) or read_settings(model.config)
    weights = model.state_dict()
    if "lm_head.bias" in weights:
        tokens, head = (
            weights["reformer.embeddings.word_embeddings.weight"],
            weights["lm_head.decoder.weight"],
        )
        tied = config.tie_embeddings and torch.equal(head, untied_head(tokens))
        biased = config.head_bias or bool(weights["lm_head.bias"].any())
        config = replace(config, tie_embeddings=tied, head_bias=biased)
    else:
        config = replace(config, classifier="first")
    config.validate()
    return config


def _classes(model: Reformer | ReformerClassifier) -> int:
    """The number of classes of a classifier; 0 for a language model. Raises ConfigError for another head."""
    if isinstance(model, Reformer):
        return 0
    if not isinstance(model.head, FirstTokenHead):
        raise ConfigError(
            "transformers' Reformer has no counterpart of model.classifier=mean: it classifies by the first token; "
            "retrain with model.classifier=first"
        )
    return model.head.output.out_features


def _warn_of_bias(model: PreTrainedModel, config: ReformerConfig) -> None:
    """Warn if the model of transformers does not add its head's bias to the logits and the bias is not zero."""
    head = getattr(model, "lm_head", None)
    if config.head_bias and head is not None and head.decoder.bias is None and head.bias.any():
        warnings.warn(
            f"{type(model).__name__}.lm_head.bias is not zero: megabase's Reformer adds it to the logits, this version "
            "of transformers does not (version 4 did), so the logits of the two models differ by this bias",
            stacklevel=3,
        )
