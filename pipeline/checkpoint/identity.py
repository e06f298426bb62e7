"""What a checkpoint belongs to: the run that wrote it, compared with the run that wants to resume from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megabase.models.config import ReformerConfig
from megabase.pipeline.checkpoint.manifest import Manifest
from megabase.pipeline.config.keys import dotted
from megabase.pipeline.config.schema import RunConfig
from megabase.pipeline.errors import UserError
from megabase.pipeline.hardware import precision_of
from megabase.pipeline.rundir.environment import versions
from megabase.pipeline.zero.settings import SavedLayout, layout_options

# Settings that decide what a run computes: a checkpoint with another value belongs to another run...
IDENTITY = ("model.", "data.", "run.seed", "run.init_")
# ...except for these, which only change where and how fast it is computed.
FREE = (
    "data.shards",
    "data.micro_batch",
    "data.workers",
    "data.prefetch",
    "data.on_error",
    "model.loss_chunk",
    "model.feedforward.chunk",
)


def manifest_of(config: RunConfig, step: int, *, ranks: int, data: str, alphabet: str) -> Manifest:
    """The manifest of a checkpoint of this run, without its files: `publish.collect_files` enters them.

    Args:
        config: the run.
        step: optimizer steps done.
        ranks: number of processes, the world size.
        data: identity of the shards (`Segments.identity`).
        alphabet: name of the shards' alphabet.
    """
    return Manifest(
        step=step,
        samples=step * config.data.global_batch,
        ranks=ranks,
        stage=config.zero.stage,
        precision=precision_of(config.trainer.precision),
        config=dotted(config),
        data=data,
        versions=versions(),
        alphabet=alphabet,
    )


def model_config(manifest: Manifest) -> ReformerConfig:
    """The settings of a checkpoint's model. Raises ConfigError for a setting that is unknown or cannot work."""
    prefix = "model."
    settings = {
        key.removeprefix(prefix): value for key, value in manifest.config.items() if key.startswith(prefix)
    }
    return ReformerConfig.from_dict(settings)


def saved_layout(manifest: Manifest) -> SavedLayout:
    """How the ranks that wrote a checkpoint laid out its states."""
    return SavedLayout(manifest.ranks, manifest.stage, manifest.precision, layout_options(manifest.config))


def check_same_run(saved: Manifest, current: Manifest, path: Path) -> None:
    """Check that a checkpoint belongs to the run that wants to resume from it.

    Args:
        saved: the checkpoint's manifest.
        current: the manifest that a checkpoint of the run would have (`manifest_of`).
        path: the checkpoint, for the message.

    Raises:
        UserError: they are different runs; the message names each difference.
    """
    saved_settings = _settings_of(saved)
    keys = sorted(k for k in {*saved_settings, *current.config} if k.startswith(IDENTITY) and k not in FREE)
    differences = [
        f"{key}: checkpoint {_written(saved_settings.get(key))}, config {_written(current.config.get(key))}"
        for key in keys
        if saved_settings.get(key) != current.config.get(key)
    ]
    if saved.data != current.data:
        differences.append(
            f"the shards: checkpoint's {saved_settings.get('data.shards')} holds other records or splits than"
            f" {current.config.get('data.shards')}"
        )
    if saved.precision != current.precision:
        differences.append(f"trainer.precision: checkpoint {saved.precision}, now {current.precision}")
    if differences:
        raise UserError(
            f"the config differs from checkpoint {path}: {'; '.join(differences)}."
            " Use the checkpoint's values, or another run.name for a new run"
        )


def changed_settings(saved: Manifest, current: Manifest) -> list[str]:
    """The settings of a run that differ from those of the checkpoint it resumes from, as "optim.lr 0.001 -> 0.0005".

    Args:
        saved: the checkpoint's manifest.
        current: the manifest that a checkpoint of the run would have (`manifest_of`).
    """
    before, now = _settings_of(saved), current.config
    # Where the run is does not matter, and `ranks` says more than these two.
    ignored = ("run.name", "run.root", "trainer.devices", "trainer.nodes", "model.vocab_size")
    changes = [
        f"{key} {_written(before.get(key))} -> {_written(now.get(key))}"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key) and key not in ignored
    ]
    if saved.ranks != current.ranks:
        changes.append(f"ranks {saved.ranks} -> {current.ranks}")
    return changes


def _settings_of(saved: Manifest) -> dict[str, Any]:
    """The settings in a checkpoint's manifest. One that did not exist when it was written had its default."""
    recorded = saved.config
    defaults = {
        key: value
        for key, value in dotted(RunConfig()).items()
        if not any(name.startswith(f"{key}.") for name in recorded)
    }
    return defaults | recorded


def _written(value: object) -> str:
    """A value as in a config: null, true, 0.001."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return str(value)
