"""`megabase export RUN OUT`: the weights of a checkpoint as one model that needs neither ranks nor DeepSpeed.

Weights are copied from the ranks' files into the new file piece by piece, so memory does not grow with the model. (For
the format of `transformers`, the full model is built in memory.) The last action renames the directory to OUT:
it is complete, or does not exist. `megabase.models.pretrained.from_pretrained` loads it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megabase.datamodules.alphabet import Alphabet
from megabase.datamodules.files import sync
from megabase.models import pretrained, safetensors
from megabase.models.huggingface import to_huggingface
from megabase.models.huggingface.settings import check_convertible
from megabase.models.reformer import Reformer
from megabase.pipeline.checkpoint.damage import checksum
from megabase.pipeline.checkpoint.identity import model_config
from megabase.pipeline.checkpoint.manifest import MANIFEST, Damaged, Manifest, read_manifest
from megabase.pipeline.errors import RunError, UserError
from megabase.pipeline.inference.model import RECORDED, chosen_step
from megabase.pipeline.inference.tokenizer import save_tokenizer
from megabase.pipeline.inference.weights import PREFIX, open_weights, read_checkpoint
from megabase.pipeline.rundir.environment import versions
from megabase.pipeline.rundir.paths import RunPaths
from megabase.pipeline.zero.states import Shards

SAFETENSORS, HUGGINGFACE = "safetensors", "huggingface"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# An export to transformers, whose config.json has a format of its own, records its source in this file.
SOURCE = "source.json"
# Elements that are in memory at once: 16 MiB of fp32.
PIECE = 1 << 22


def export(run: Path, out: Path, *, form: str, step: int | str | None, dtype: str) -> Path:
    """Write the weights of a run to the new directory `out`.

    A run that trains may delete the checkpoint while it is read. Without `step`, the newest one left is then used.

    Args:
        run: a run directory; it may be training.
        out: a directory that does not exist yet.
        form: safetensors or huggingface.
        step: step of the checkpoint; BEST: the one with the lowest validation loss; None: the newest intact one.
        dtype: dtype of the exported weights, fp32 or bf16. Those of a checkpoint are fp32.

    Returns:
        The checkpoint whose weights were exported.

    Raises:
        UserError: `out` exists, or lies among the checkpoints, or `run` has no such checkpoint, or no intact one.
        ConfigError: `form` is huggingface, and transformers has no counterpart for a setting of the model.
        RunError: the disk is full, or the checkpoint does not contain the model of its manifest.
    """
    out = out.absolute()
    partial = out.parent / f"{out.name}.partial"
    _check_output(run, out, partial)
    checkpoint, _ = read_checkpoint(
        run,
        chosen_step(run, step),
        lambda checkpoint: _export(checkpoint, out, partial, form=form, dtype=dtype),
        None if form == SAFETENSORS else _check_convertible,
    )
    return checkpoint


def source_of(checkpoint: Path, manifest: Manifest, dtype: str) -> dict[str, Any]:
    """What an export records about its source. `alphabet` is None if the checkpoint did not record it."""
    return {
        "alphabet": manifest.alphabet,
        "dtype": dtype,
        "step": manifest.step,
        "samples": manifest.samples,
        "settings": {key: manifest.config[key] for key in RECORDED if key in manifest.config},
        "checkpoint": str(checkpoint.absolute()),
        "manifest_sha256": checksum(checkpoint / MANIFEST),
        "trained_with": manifest.versions,
        "exported_with": versions(),
    }


def _check_output(run: Path, out: Path, partial: Path) -> None:
    """Raise UserError unless `out` can be made."""
    for path, way_out in (
        (out, "choose another OUT"),
        (partial, "an export is writing it, or was killed: remove it"),
    ):
        if path.exists() or path.is_symlink():
            raise UserError(f"{path} exists already: {way_out}")
    if out.resolve().is_relative_to(RunPaths(run).checkpoints.resolve()):
        raise UserError(f"{out} is among the checkpoints of {run}: choose another OUT")


def _export(checkpoint: Path, out: Path, partial: Path, *, form: str, dtype: str) -> None:
    """Write `out` from an intact checkpoint. Raises Damaged or RunError if the checkpoint was changed or deleted."""
    try:
        manifest = read_manifest(checkpoint)
        config = model_config(manifest)
        model = pretrained.empty(config)
        shards = open_weights(checkpoint, manifest, model)
        source = source_of(checkpoint, manifest, dtype)
    except OSError as error:
        raise Damaged(str(error)) from None
    shapes = pretrained.stored_shapes(model)
    try:
        partial.mkdir(parents=True)
        try:
            _check_space(partial, shapes, DTYPES[dtype])
            if form == SAFETENSORS:
                _write(partial, shards, shapes, DTYPES[dtype], {"model": asdict(config), **source})
            else:
                _write_huggingface(partial, model, shards, shapes, DTYPES[dtype], source)
            _publish(partial, out)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    except OSError as error:
        raise RunError(f"{out} cannot be written: {error.strerror or error}") from None


def _check_convertible(manifest: Manifest) -> None:
    check_convertible(model_config(manifest))


def _check_space(directory: Path, shapes: Mapping[str, torch.Size], dtype: torch.dtype) -> None:
    needed = sum(shape.numel() for shape in shapes.values()) * dtype.itemsize
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise RunError(
            f"{directory.parent} has {free:,} bytes free, but the weights need {needed:,}: make room"
        )


def _write(
    partial: Path,
    shards: Shards,
    shapes: Mapping[str, torch.Size],
    dtype: torch.dtype,
    config: dict[str, Any],
) -> None:
    """Write `model.safetensors`, piece by piece, and `config.json`."""

    def pieces(name: str) -> Iterator[Tensor]:
        for start in range(0, shapes[name].numel(), PIECE):
            yield shards.read(PREFIX + name, "fp32", start, min(start + PIECE, shapes[name].numel()))

    safetensors.write(partial / pretrained.WEIGHTS, shapes, dtype, pieces, {"format": "pt"})
    (partial / pretrained.CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def _write_huggingface(
    partial: Path,
    model: Reformer,
    shards: Shards,
    shapes: Mapping[str, torch.Size],
    dtype: torch.dtype,
    source: dict[str, Any],
) -> None:
    """Write the files of a `transformers` Reformer and of its tokenizer, and `source.json`."""
    weights = {name: shards.read(PREFIX + name).view(shape).to(dtype) for name, shape in shapes.items()}
    converted = to_huggingface(pretrained.filled(model, weights).eval())
    with _without_progress_bars():
        converted.save_pretrained(partial)
    if source["alphabet"] is not None:  # a checkpoint of an early version does not record it
        save_tokenizer(Alphabet.named(source["alphabet"]), model.body.config.max_length, partial)
    (partial / SOURCE).write_text(json.dumps(source, indent=2) + "\n")


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    """Keep the progress bars of `transformers` off the terminal, which is for our messages."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _publish(partial: Path, out: Path) -> None:
    """Sync everything to disk and rename it to `out`."""
    for path in (*partial.iterdir(), partial):
        sync(path)
    if out.exists():  # rename would replace an empty directory
        raise UserError(f"{out} was made by another process meanwhile: choose another OUT")
    partial.rename(out)
    sync(out.absolute().parent)
