"""The settings of a fine-tuning: those of the pretrained model, defaults that fit the data, the user's over both."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from megabase.datamodules.config import CAUSAL, MASKED
from megabase.datamodules.index.segments import TRAIN
from megabase.models import pretrained
from megabase.models.config import ConfigError, ReformerConfig
from megabase.pipeline.config.load import with_settings
from megabase.pipeline.config.schema import RunConfig
from megabase.pipeline.errors import UserError
from megabase.pipeline.finetune.examples import Examples
from megabase.pipeline.finetune.layout import layout_of, most_letters
from megabase.pipeline.finetune.model import FULL, LORA, PROBE

EPOCHS = 10
"""Passes over the training examples where `trainer.max_steps` is not set."""
GLOBAL_BATCH = 32
RATES = {PROBE: 1e-2, LORA: 1e-3, FULL: 1e-4}
"""Peak learning rate of each mode."""
TOKENS = 1 << 16
"""A micro batch has about so many tokens at most, where `data.micro_batch` is not set."""
WITHOUT_EFFECT = (
    "run.name",
    "run.root",
    "run.init_from",
    "run.init_partial",
    "data.shards",
    "data.length",
    "data.objective",
    "data.min_real",
    "data.mask_rate",
    "data.stride",
    "data.shift",
    "data.softmask_weight",
    "data.mixture",
    "data.pack",
    "data.on_error",
    "trainer.eval_recall",
    "trainer.eval_sequences",
    "tracking.report",
    "tracking.log_model",
    "tracking.register",
)
"""Settings of pretraining that a fine-tuning does not have, or that follow from its arguments."""


@dataclass(frozen=True)
class Pretrained:
    """The model to start from.

    Attributes:
        path: of MODEL, absolute.
        config: of its model.
        alphabet: its name.
        length: bases of a window of its training; None: not known.
    """

    path: Path
    config: ReformerConfig
    alphabet: str
    length: int | None = None


def settings_of(
    model: Pretrained,
    table: Path,
    run: Path,
    mode: str,
    examples: Examples,
    overrides: Sequence[str],
    devices: int,
) -> RunConfig:
    """The settings of a run.

    Args:
        model: to start from.
        table: the labelled data.
        run: the run directory.
        mode: see Method.
        examples: of the table.
        overrides: settings as "key.path=value".
        devices: ranks, for the size of a micro batch.

    Raises:
        UserError: a setting has no effect here, or cannot work, or a sequence is longer than the model can read.
        ConfigError: `model.*` cannot work.
    """
    keys = {each.partition("=")[0] for each in overrides}
    for key in sorted(keys):
        if key in WITHOUT_EFFECT or key.startswith(tuple(f"{each}." for each in WITHOUT_EFFECT)):
            raise UserError(f"{key} has no effect on a fine-tuning: leave it out")
    _check_longest(model, examples, table)
    base = RunConfig()
    base.run.name, base.run.root = run.name, str(run.parent)
    base.run.init_from = str(model.path)
    base.model = model.config
    base.data.shards = str(table)
    base.data.objective = CAUSAL if model.config.causal else MASKED
    base.data.length = layout_of(model.config, len(examples.sequences[examples.longest])).length
    base.data.global_batch = GLOBAL_BATCH
    base.optim.lr, base.optim.weight_decay = RATES[mode], 0.01
    base.tracking.report = False
    config = with_settings(base, {}, "fine-tuning", overrides)
    _check_weights(model.config, config.model)
    _fill(config, keys, max(-(-len(examples.of(TRAIN)) // config.data.global_batch), 1))
    if "data.micro_batch" not in keys:
        config.data.micro_batch = _micro_batch(config, devices)
    config.validate()
    return config


def _fill(config: RunConfig, keys: Collection[str], epoch: int) -> None:
    """Set what follows from the steps of an epoch, except for the settings in `keys`."""
    if "trainer.max_steps" not in keys:
        config.trainer.max_steps = EPOCHS * epoch
    if "optim.warmup_steps" not in keys:
        config.optim.warmup_steps = min(100, config.trainer.max_steps // 10)
    if "trainer.eval_every_steps" not in keys:
        config.trainer.eval_every_steps = epoch
    if "checkpoint.every_steps" not in keys:
        config.checkpoint.every_steps = config.trainer.eval_every_steps
    if "checkpoint.keep" not in keys:
        config.checkpoint.keep = 1
    # Evaluations and checkpoints of different steps leave the last checkpoint as the result.
    if (
        "checkpoint.keep_best" not in keys
        and config.checkpoint.every_steps == config.trainer.eval_every_steps
    ):
        config.checkpoint.keep_best = 1 if config.checkpoint.every_steps else 0


def _check_weights(before: ReformerConfig, now: ReformerConfig) -> None:
    """Raise ConfigError if a setting under `model` changes the shape of a weight, which is trained."""
    if before == now:
        return
    old, new = (pretrained.stored_shapes(pretrained.empty(config)) for config in (before, now))
    changed = sorted(name for name in {*old, *new} if old.get(name) != new.get(name))
    if changed:
        raise ConfigError(
            f"a setting under model changes the weight {changed[0]}, which is trained: leave that setting as it was"
        )


def _micro_batch(config: RunConfig, devices: int) -> int:
    """The largest part of a rank's share of the global batch that has at most TOKENS tokens; at least 1."""
    share = max(config.data.global_batch // devices, 1)
    fitting = [
        size for size in range(1, share + 1) if share % size == 0 and size * config.data.length <= TOKENS
    ]
    return max(fitting, default=1)


def _check_longest(model: Pretrained, examples: Examples, table: Path) -> None:
    """Raise UserError if a sequence is longer than the model can read."""
    longest, most = examples.longest, most_letters(model.config)
    letters = len(examples.sequences[longest])
    if most is not None and letters > most:
        raise UserError(
            f"{table}: {examples.names[longest]}: {letters:,} letters, but {model.path} reads {most:,} at most"
            f" (model.positions={model.config.positions}, model.max_length={model.config.max_length}): shorten the"
            " sequence, or take a model with model.positions=rotary"
        )
