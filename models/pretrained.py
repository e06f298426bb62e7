"""A trained Reformer out of a directory that `megabase export` wrote.

    model = from_pretrained("out")

The directory holds `model.safetensors` (the state dict, tied weights once) and `config.json` (`model`: the settings
of ReformerConfig; beside them what the pipeline knows of the training). Neither can run code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from megabase.models import safetensors
from megabase.models.config import ConfigError, ReformerConfig
from megabase.models.reformer import Reformer

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
TIED = {"head.weight": "body.embedding.tokens.weight"}
"""With `tie_embeddings`: the name that is not stored, and the one that is."""


def from_pretrained(directory: str | Path) -> Reformer:
    """The exported model on the CPU, in the dtype of its file, in evaluation mode.

    Raises:
        ConfigError: the directory holds no export, or not one that is whole.
    """
    directory = Path(directory)
    try:
        content = json.loads((directory / CONFIG).read_text())
        if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
            raise ConfigError(
                f"{directory / CONFIG} has no settings of a Reformer under 'model': give a directory that"
                " `megabase export --format safetensors` wrote"
            )
        config = ReformerConfig.from_dict(content["model"])
        weights = safetensors.read(directory / WEIGHTS)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ConfigError(
            f"{error.filename} is missing: give a directory that `megabase export` wrote"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{directory / CONFIG} cannot be read: {error}") from None
    model = empty(config)
    wanted = stored_shapes(model)
    found = {name: weight.shape for name, weight in weights.items()}
    if differing := sorted(name for name in {*wanted, *found} if wanted.get(name) != found.get(name)):
        raise ConfigError(
            f"{directory / WEIGHTS} does not have the weights that {CONFIG} beside it describes"
            f" ({differing[0]}, {len(differing)} such): export again"
        )
    return filled(model, weights).eval()


def empty(config: ReformerConfig) -> Reformer:
    """A Reformer without weights: on the meta device, in no memory."""
    with torch.device("meta"):
        return Reformer(config)


def stored_shapes(model: Reformer) -> dict[str, torch.Size]:
    """Shape of each weight that a file holds, by its name in the state dict, in that order."""
    tied = TIED if model.body.config.tie_embeddings else {}
    return {name: weight.shape for name, weight in model.state_dict().items() if name not in tied}


def filled(model: Reformer, weights: Mapping[str, torch.Tensor]) -> Reformer:
    """`empty`'s model with these weights, which become its own; named and shaped as `stored_shapes` says."""
    tied = TIED if model.body.config.tie_embeddings else {}
    state = dict(weights) | {name: weights[source] for name, source in tied.items()}
    model.load_state_dict(state, assign=True)
    if tied:
        model.head.weight = model.body.embedding.tokens.weight
    return model
