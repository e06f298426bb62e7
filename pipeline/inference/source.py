"""The weights of a run or an export, one by one: what a new run starts from (`run.init_from`).

A source is a run directory (its newest intact checkpoint), one of its checkpoints, or what `megabase export` wrote.
`describe` reads settings and shapes, and imports no DeepSpeed. `open_source` checks the files and reads weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megabase.models import pretrained, safetensors
from megabase.models.config import ConfigError, ReformerConfig
from megabase.pipeline.checkpoint.choose import choose_to_read
from megabase.pipeline.checkpoint.identity import model_config
from megabase.pipeline.checkpoint.manifest import Damaged, Manifest, list_checkpoints, read_manifest, step_of
from megabase.pipeline.errors import RunError, UserError
from megabase.pipeline.rundir.paths import CHECKPOINTS, RunPaths


@dataclass(frozen=True)
class Description:
    """What a source holds.

    Attributes:
        path: the checkpoint or the export.
        model: the settings of its model.
        alphabet: its name; None if the source is of a version that did not record it.
        step: optimizer steps that it was trained for.
        shapes: of all weights by name; a tied weight once.
    """

    path: Path
    model: ReformerConfig
    alphabet: str | None
    step: int
    shapes: Mapping[str, torch.Size]


@dataclass(frozen=True)
class OpenSource:
    """A source whose files are intact.

    Attributes:
        description: what it holds.
        read: name of a weight -> the weight, fp32 on the CPU.
    """

    description: Description
    read: Callable[[str], Tensor]


def describe(source: Path) -> Description:
    """What a source holds, from its settings alone. Of a run, the newest checkpoint with an intact manifest counts.

    Raises:
        UserError: it is none of the three, or holds no checkpoint, or the checkpoint's manifest is damaged.
        ConfigError: the settings of its model cannot work.
    """
    if _is_export(source):
        return _of_export(source)
    run, step = _run_and_step(source)
    candidates = list_checkpoints(RunPaths(run).checkpoints) if step is None else [source]
    if not candidates:
        raise UserError(f"run.init_from={source}: the run has no checkpoint yet")
    problem = ""
    for checkpoint in candidates:
        try:
            return _of_checkpoint(checkpoint, read_manifest(checkpoint))
        except (Damaged, OSError) as error:
            problem = problem or f"{checkpoint} cannot be used ({error})"
    raise UserError(f"run.init_from={source}: {problem}: take another checkpoint")


def open_source(source: Path, *, check_files: bool = True) -> OpenSource:
    """Check the files of a source and open it. Of a run, the newest intact checkpoint is taken.

    Args:
        source: see above.
        check_files: False: it is a checkpoint or an export whose files were just checked.

    Raises:
        UserError: see `describe`; or no checkpoint is intact.
        ConfigError: the export is damaged.
        RunError: a checkpoint cannot be read.
    """
    if _is_export(source):
        described = _of_export(source)
        weights = safetensors.read(source / pretrained.WEIGHTS)
        return OpenSource(described, lambda name: weights[name].float())
    # Imported here, because it imports DeepSpeed.
    from megabase.pipeline.inference.weights import PREFIX, open_weights

    run, step = _run_and_step(source)
    checkpoint = choose_to_read(run, step) if check_files else source
    try:
        manifest = read_manifest(checkpoint)
    except (Damaged, OSError) as error:
        raise RunError(f"checkpoint {checkpoint} cannot be read: {error}") from None
    described = _of_checkpoint(checkpoint, manifest)
    shards = open_weights(checkpoint, manifest, pretrained.empty(described.model))
    return OpenSource(described, lambda name: shards.read(PREFIX + name).view(described.shapes[name]))


def _is_export(source: Path) -> bool:
    return (source / pretrained.CONFIG).exists() and (source / pretrained.WEIGHTS).exists()


def _run_and_step(source: Path) -> tuple[Path, int | None]:
    """The run directory, and the step if the source is one of its checkpoints."""
    if source.parent.name == CHECKPOINTS and source in list_checkpoints(source.parent):
        return source.parent.parent, step_of(source)
    if RunPaths(source).checkpoints.is_dir():
        return source, None
    raise UserError(
        f"run.init_from={source}: not a run directory, nor one of its checkpoints (RUN/checkpoints/step-N), nor what"
        " `megabase export` wrote"
    )


def _of_checkpoint(checkpoint: Path, manifest: Manifest) -> Description:
    model = model_config(manifest)
    return Description(checkpoint, model, manifest.alphabet, manifest.step, _shapes(model))


def _of_export(source: Path) -> Description:
    try:
        content = json.loads((source / pretrained.CONFIG).read_text())
        alphabet, step = content.get("alphabet"), int(content.get("step", 0))
        model = pretrained.read_config(source / pretrained.CONFIG)
    except (ValueError, AttributeError, TypeError) as error:
        raise ConfigError(f"{source / pretrained.CONFIG} is damaged ({error}): export again") from None
    return Description(source, model, alphabet, step, _shapes(model))


def _shapes(model: ReformerConfig) -> dict[str, torch.Size]:
    return pretrained.stored_shapes(pretrained.empty(model))
