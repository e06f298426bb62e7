"""Load a trained model with what using it needs: its alphabet, and the settings of the run that trained it.

MODEL is a run directory (its newest intact checkpoint, or another one) or a directory that `megabase export` wrote.
Every command that uses a model loads it here. Reading a checkpoint imports DeepSpeed, reading an export does not.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megabase.datamodules.alphabet import Alphabet
from megabase.datamodules.config import CAUSAL, MASKED
from megabase.models import pretrained
from megabase.models.config import ConfigError, ReformerConfig
from megabase.models.reformer import Reformer
from megabase.pipeline.checkpoint.manifest import list_checkpoints, read_manifest, step_of
from megabase.pipeline.checkpoint.retention import best_steps, validation_losses
from megabase.pipeline.config.load import with_settings
from megabase.pipeline.config.schema import RunConfig
from megabase.pipeline.errors import UserError
from megabase.pipeline.rundir.paths import RunPaths

logger = logging.getLogger(__name__)

BEST = "best"
# Settings of the run that a use of its model needs: how its data were read and scored. An export records them.
RECORDED = (
    "run.seed",
    "data.shards",
    "data.length",
    "data.objective",
    "data.mask_rate",
    "data.min_real",
    "data.pack",
    "data.on_error",
    "data.micro_batch",
    "trainer.precision",
)
ALPHABETS = ("dna", "protein", "bytes")


@dataclass(frozen=True)
class Source:
    """Where a model comes from.

    Attributes:
        path: the run directory or the export.
        step: optimizer steps that it was trained for.
        checkpoint: path of the checkpoint that its weights come from.
    """

    path: str
    step: int
    checkpoint: str


@dataclass(frozen=True)
class LoadedModel:
    """A trained model.

    Attributes:
        model: on the CPU, in fp32, in evaluation mode.
        alphabet: of its tokens.
        config: the settings of its run that RECORDED names, and its `model`; all others have their defaults, and
            `data.shards` is empty if it was not recorded.
        source: where it comes from.
    """

    model: Reformer
    alphabet: Alphabet
    config: RunConfig
    source: Source


def warn_of_context(loaded: LoadedModel, longest: int, what: str, way_out: str = "") -> None:
    """Warn if a model is to use more context than it was trained on.

    Args:
        loaded: the model.
        longest: bases.
        what: has that many, the beginning of the sentence.
        way_out: its end.
    """
    trained = loaded.config.data.length
    if longest > trained:
        logger.warning(
            f"{what}, and the model was trained on windows of {trained:,}: it was never trained to use more context"
            f" than that{way_out}"
        )


def load_model(path: Path, step: int | str | None = None, settings: Sequence[str] = ()) -> LoadedModel:
    """Load the model in a run directory or an export.

    Args:
        path: the directory. A run may be training.
        step: of the checkpoint; BEST: the one with the lowest validation loss; None: the newest intact one, and a
            damaged one before it is named in a warning. None for an export.
        settings: KEY=VALUE settings that replace those of the run. A setting under `model` must not change the shape of
            a weight: `model.lsh.rounds` does not.

    Raises:
        UserError: `path` holds no model, or no such checkpoint, or no intact one; a setting is unknown or cannot work.
        ConfigError: the export is damaged, or the model's settings cannot work.
        RunError: the checkpoint cannot be read.
    """
    if RunPaths(path).checkpoints.is_dir():
        return _of_run(path, chosen_step(path, step), settings)
    if not (path / pretrained.CONFIG).exists():
        raise UserError(
            f"{path} holds no model: give a run directory, <run.root>/<run.name>, or what `megabase export` wrote"
        )
    if step is not None:
        given = f"--{BEST}" if step == BEST else f"--step {step}"
        raise UserError(f"{given}: {path} is an export, of one checkpoint: leave {given.split()[0]} out")
    return _of_export(path, settings)


def chosen_step(run: Path, step: int | str | None) -> int | None:
    """The step of a checkpoint of a run, where BEST stands for `best_step`."""
    if isinstance(step, str):
        assert step == BEST
        return best_step(run)
    return step


def best_step(run: Path) -> int:
    """The step of the checkpoint with the lowest validation loss. Raises UserError if none has one."""
    losses = validation_losses(RunPaths(run).metrics)
    best = best_steps(map(step_of, list_checkpoints(RunPaths(run).checkpoints)), losses, 1)
    if not best:
        raise UserError(
            f"--best: no checkpoint of {run} has a validation loss; `megabase checkpoints {run}` lists them"
        )
    return best[0]


def _of_run(run: Path, step: int | None, settings: Sequence[str]) -> LoadedModel:
    # Imported here, because it imports DeepSpeed.
    from megabase.pipeline.inference.weights import load_weights, read_checkpoint

    def read(checkpoint: Path) -> LoadedModel:
        manifest = read_manifest(checkpoint)
        model = load_weights(checkpoint, manifest)
        source = Source(str(run), manifest.step, str(checkpoint))
        return _loaded(model, manifest.alphabet, manifest.config, settings, source)

    return read_checkpoint(run, step, read)[1]


def _of_export(path: Path, settings: Sequence[str]) -> LoadedModel:
    model = pretrained.from_pretrained(path).float()
    content = json.loads((path / pretrained.CONFIG).read_text())
    recorded = content.get("settings", {})
    recorded = recorded if isinstance(recorded, dict) else {}
    source = Source(str(path), int(content.get("step", 0)), str(content.get("checkpoint", "")))
    return _loaded(model, content.get("alphabet"), recorded, settings, source)


def _loaded(
    model: Reformer, alphabet: str | None, recorded: dict[str, Any], settings: Sequence[str], source: Source
) -> LoadedModel:
    base = RunConfig()
    base.run.name, base.data.shards = "model", ""  # without them, no tree of settings is complete
    base.model = model.body.config
    # An export of an older version records neither of these.
    base.data.objective = CAUSAL if base.model.causal else MASKED
    base.data.length = base.model.max_length or base.data.length
    values: dict[str, dict[str, Any]] = {}
    for key in RECORDED:
        if key in recorded:
            section, _, name = key.partition(".")
            values.setdefault(section, {})[name] = recorded[key]
    config = with_settings(base, values, source.path, settings)
    if config.model != model.body.config:
        model = _changed(model, config.model)
    return LoadedModel(model, _alphabet(alphabet, config.model.vocab_size), config, source)


def _changed(model: Reformer, config: ReformerConfig) -> Reformer:
    """The same weights in a model of other settings. Raises ConfigError if the weights have other shapes in it."""
    config.validate()
    other = pretrained.empty(config)
    weights = model.state_dict()
    shapes = pretrained.stored_shapes(other)
    for name in sorted({*shapes, *pretrained.stored_shapes(model)}):
        if name not in shapes or name not in weights or weights[name].shape != shapes[name]:
            raise ConfigError(
                f"a setting under model changes the weight {name}, which is trained: leave that setting as it was"
            )
    return pretrained.filled(other, {name: weights[name] for name in shapes}).eval()


def _alphabet(name: str | None, vocabulary: int | None) -> Alphabet:
    """The alphabet of a model. A checkpoint of an old version does not name it; then its size tells."""
    if name is not None:
        return Alphabet.named(name)
    fitting = [known for known in map(Alphabet.named, ALPHABETS) if known.vocab_size == vocabulary]
    if not fitting:
        raise UserError(f"the model has {vocabulary} tokens, as no alphabet of megabase has")
    return fitting[0]
