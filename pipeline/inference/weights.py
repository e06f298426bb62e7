"""The weights of a run's checkpoint as those of one model, whatever ranks and ZeRO stage wrote them.

Imports DeepSpeed, without which the files of a checkpoint cannot be read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from megabase.models import pretrained
from megabase.models.reformer import Reformer
from megabase.pipeline.checkpoint.choose import ATTEMPTS, choose_to_read
from megabase.pipeline.checkpoint.identity import model_config, saved_layout
from megabase.pipeline.checkpoint.manifest import Damaged, Manifest
from megabase.pipeline.errors import RunError, UserError
from megabase.pipeline.rundir.paths import RunPaths
from megabase.pipeline.zero.states import Shards

T = TypeVar("T")
# Names of the Reformer's weights in the trained module begin with this.
PREFIX = "model."


def read_checkpoint(
    run: Path,
    step: int | None,
    read: Callable[[Path], T],
    check: Callable[[Manifest], None] | None = None,
) -> tuple[Path, T]:
    """Read a checkpoint of a run that may be training, and may therefore delete it meanwhile.

    Args:
        run: the run directory.
        step: of the checkpoint; None: the newest intact one, or if that is deleted meanwhile, the newest one left.
        read: reads the checkpoint in a directory; may raise Damaged or RunError if it was changed or deleted.
        check: see `choose_to_read`.

    Returns:
        The checkpoint, and what `read` returned.

    Raises:
        UserError: `run` has no such checkpoint, or no intact one.
        RunError: the checkpoint cannot be read, or was deleted.
    """
    for _ in range(ATTEMPTS):
        checkpoint = choose_to_read(run, step, check)
        try:
            return checkpoint, read(checkpoint)
        except (Damaged, RunError) as error:
            if checkpoint.exists():
                if isinstance(error, RunError):
                    raise
                raise RunError(f"checkpoint {checkpoint} cannot be read: {error}") from None
        if step is not None:
            break
    raise RunError(
        f"checkpoint {checkpoint} was deleted by its run while it was read: try again, or choose with --step a"
        " checkpoint that checkpoint.keep_every keeps"
    )


def open_weights(checkpoint: Path, manifest: Manifest, model: Reformer) -> Shards:
    """Open the files of a checkpoint. The weight `name` of the model is `PREFIX + name` in them.

    Args:
        checkpoint: its directory.
        manifest: its manifest.
        model: with the settings of `manifest`, on any device.

    Raises:
        RunError: a file is missing or damaged, or the checkpoint is of another model.
    """
    shards = Shards.open(checkpoint, saved_layout(manifest))
    _check_weights(checkpoint, shards, pretrained.stored_shapes(model))
    return shards


def load_weights(checkpoint: Path, manifest: Manifest) -> Reformer:
    """The model of a checkpoint on the CPU, with its fp32 weights, in evaluation mode. Raises as `open_weights`."""
    model = pretrained.empty(model_config(manifest))
    shards = open_weights(checkpoint, manifest, model)
    shapes = pretrained.stored_shapes(model)
    weights = {name: shards.read(PREFIX + name).view(shape) for name, shape in shapes.items()}
    return pretrained.filled(model, weights).eval()


def _check_weights(checkpoint: Path, shards: Shards, shapes: Mapping[str, torch.Size]) -> None:
    """Raise RunError unless the checkpoint has the weights of the model that its manifest describes."""
    saved: dict[str, Any] = {name.removeprefix(PREFIX): shards.shapes[name] for name in shards.names}
    run = checkpoint.absolute().parent.parent
    if RunPaths(run).finetune.exists():
        raise UserError(
            f"{run} is the run of a fine-tuning, which predicts labels: use `megabase finetune {run} TABLE --predict`;"
            f" the model that it started from is {run / 'base'}"
        )
    if differing := sorted(name for name in {*saved, *shapes} if saved.get(name) != shapes.get(name)):
        name = differing[0]
        raise RunError(
            f"checkpoint {checkpoint} is not of the model that its manifest describes: {name} has the shape"
            f" {saved.get(name)}, not {shapes.get(name)}: take another checkpoint"
        )
