"""Load a trained Reformer from a directory that `megabase export` wrote.

    model = from_pretrained("out")

The directory holds `model.safetensors` (the state dict, tied weights once) and `config.json` (under `model` the
settings of ReformerConfig, and beside them what the pipeline recorded of the training). Neither can run code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from megabase.models import safetensors
from megabase.models.config import BEFORE_THE_SETTING, ConfigError, ReformerConfig
from megabase.models.reformer import Reformer

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
TIED = {"head.weight": "body.embedding.tokens.weight"}
"""With `tie_embeddings`: the weight that a file leaves out -> the weight that it is tied to."""


def from_pretrained(directory: str | Path) -> Reformer:
    """Load an exported model.

    Args:
        directory: what `megabase export --format safetensors` wrote.

    Returns:
        The model on the CPU, in the dtype of its file, in evaluation mode.

    Raises:
        ConfigError: the directory holds no export, or a damaged or incomplete one.
    """
    directory = Path(directory)
    for path in (directory / CONFIG, directory / WEIGHTS):
        if not path.exists():
            raise ConfigError(f"{path} is missing: give a directory that `megabase export` wrote")
    config = read_config(directory / CONFIG)
    weights = safetensors.read(directory / WEIGHTS)
    model = empty(config)
    expected = stored_shapes(model)
    found = {name: weight.shape for name, weight in weights.items()}
    differing = sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))
    if differing:
        raise ConfigError(
            f"{directory / WEIGHTS} does not have the weights that {CONFIG} beside it describes: {differing[0]!r} "
            f"differs ({len(differing)} in all): export again"
        )
    return filled(model, weights).eval()


def empty(config: ReformerConfig) -> Reformer:
    """A Reformer whose weights are on the meta device: shapes without memory."""
    with torch.device("meta"):
        return Reformer(config)


def stored_shapes(model: Reformer) -> dict[str, torch.Size]:
    """The shape of each weight that a file holds, by its name in the state dict, in that order."""
    tied = TIED if model.body.config.tie_embeddings else {}
    return {name: weight.shape for name, weight in model.state_dict().items() if name not in tied}


def filled(model: Reformer, weights: Mapping[str, Tensor]) -> Reformer:
    """Put weights into a model that has none yet.

    Args:
        model: a model that `empty` returned.
        weights: named and shaped as `stored_shapes` says; they are not copied.

    Returns:
        The same model.
    """
    tied = TIED if model.body.config.tie_embeddings else {}
    state = dict(weights) | {name: weights[source] for name, source in tied.items()}
    model.load_state_dict(state, assign=True)
    if tied:
        model.head.weight = model.body.embedding.tokens.weight
    return model


def read_config(path: Path) -> ReformerConfig:
    try:
        content = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise ConfigError(
            f"{path} has no settings of a Reformer under 'model': give a directory that "
            "`megabase export --format safetensors` wrote"
        )
    return ReformerConfig.from_dict(BEFORE_THE_SETTING | content["model"])
