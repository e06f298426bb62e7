"""The pretrained weights of a fine-tuning: a copy in its run directory, in the format of `megabase export`."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megabase.models import pretrained
from megabase.models.config import ReformerConfig
from megabase.models.reformer import Body
from megabase.pipeline.errors import RunError, UserError
from megabase.pipeline.inference.export import SAFETENSORS, export
from megabase.pipeline.inference.source import describe, open_source
from megabase.pipeline.rundir.paths import RunPaths

FOLDER = "base"
BODY = "body."


def copy(model: Path, step: int | str | None, run: Path) -> None:
    """Copy the weights of MODEL to RUN/base, unless they are there. It appears complete.

    Args:
        model: a run directory, or what `megabase export` wrote.
        step: of a run's checkpoint; see `load_model`.
        run: the directory of the fine-tuning.

    Raises:
        UserError, RunError: the weights cannot be read, or the copy cannot be written.
    """
    out = run / FOLDER
    if out.exists():
        return
    partial = run / f"{FOLDER}.partial"
    shutil.rmtree(partial, ignore_errors=True)  # of a start that was killed
    if RunPaths(model).checkpoints.is_dir():
        export(model, out, form=SAFETENSORS, step=step, dtype="fp32")
        return
    if step is not None:
        raise UserError(f"--step {step}: {model} is an export, of one checkpoint: leave it out")
    try:
        partial.mkdir(parents=True)
        for name in (pretrained.CONFIG, pretrained.WEIGHTS):
            shutil.copyfile(model / name, partial / name)
        partial.rename(out)
    except OSError as error:
        raise RunError(f"{out} cannot be written: {error.strerror or error}") from None


def load_body(run: Path, config: ReformerConfig) -> Body:
    """The pretrained body in RUN/base on the CPU, in fp32, with the settings of the fine-tuning.

    Raises:
        UserError: it is gone.
        ConfigError: it is damaged.
    """
    if not (run / FOLDER).exists():
        raise UserError(f"{run / FOLDER}, the pretrained weights of this run, is gone: put it back")
    read = open_source(run / FOLDER).read
    model = pretrained.empty(config)
    weights = {name: read(name) for name in pretrained.stored_shapes(model)}
    return pretrained.filled(model, weights).body


def filler(run: Path) -> Callable[[Any], None]:
    """Puts the pretrained weights into the body of a model that all ranks have built; see `zero.construction.fill`."""
    read = open_source(run / FOLDER).read
    shapes = describe(run / FOLDER).shapes

    def fill(model: Any) -> None:
        from megabase.pipeline.zero import construction

        construction.fill(model, {name for name in shapes if name.startswith(BODY)}, read)

    return fill
