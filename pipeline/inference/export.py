"""`megabase export RUN OUT`: the weights of a checkpoint as one model that needs neither ranks nor DeepSpeed.

Weights go from the ranks' files straight into the new one, a piece at a time: memory does not grow with the model.
(To the format of `transformers` they go through a whole model.) What is written is named last: OUT is complete, or
not there. `megabase.models.pretrained.from_pretrained` loads it.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megabase.datamodules.alphabet import Alphabet
from megabase.datamodules.files import sync
from megabase.models import pretrained, safetensors
from megabase.models.config import ReformerConfig
from megabase.models.huggingface import to_huggingface
from megabase.models.huggingface.settings import check_convertible
from megabase.models.reformer import Reformer
from megabase.pipeline.checkpoint.manifest import (
    MANIFEST,
    Damaged,
    Manifest,
    checksum,
    list_checkpoints,
    read_manifest,
    step_of,
    verify,
)
from megabase.pipeline.errors import RunError, UserError
from megabase.pipeline.rundir.environment import versions
from megabase.pipeline.zero.states import Shards

SAFETENSORS, HUGGINGFACE = "safetensors", "huggingface"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ALPHABETS = ("dna", "protein", "bytes")
# Where an export to transformers says what it was made of: config.json is theirs.
SOURCE = "source.json"
# The Reformer within the trained module.
PREFIX = "model."
# Elements that are in memory at once: 16 MiB of fp32.
PIECE = 1 << 22
# A run that trains may delete the newest checkpoint while it is read: then the one that took its place is taken.
ATTEMPTS = 5


def export(run: Path, out: Path, *, form: str, step: int | None, dtype: str) -> Path:
    """Write the weights of a run to the new directory `out`; returns the checkpoint that they are of.

    Args:
        run: a run directory; it may be training.
        form: safetensors or huggingface.
        step: of the checkpoint; None: the newest that verifies.
        dtype: of the weights there, fp32 or bf16; the checkpoint's are fp32.

    Raises:
        UserError: `out` is there, or among the checkpoints, or `run` has no such checkpoint, or not a whole one.
        ConfigError: to huggingface: a setting of the model has no counterpart there.
        RunError: the disk is full, or the checkpoint does not hold the model that it should.
    """
    out = out.absolute()
    partial = out.parent / f"{out.name}.partial"
    for path, hint in (
        (out, "choose another OUT"),
        (partial, "an export is writing it, or was killed: remove it"),
    ):
        if path.exists() or path.is_symlink():
            raise UserError(f"{path} exists already: {hint}")
    if out.resolve().is_relative_to((run / "checkpoints").resolve()):
        raise UserError(f"{out} is among the checkpoints of {run}: choose another OUT")
    for _ in range(ATTEMPTS):
        checkpoint = choose(run, step, None if form == SAFETENSORS else _check_maps)
        try:
            _export(checkpoint, out, partial, form=form, dtype=dtype)
        except (Damaged, RunError) as error:
            if checkpoint.exists():
                if isinstance(error, RunError):
                    raise
                raise RunError(f"checkpoint {checkpoint} cannot be read: {error}") from None
        else:
            return checkpoint
        if step is not None:
            break
    raise RunError(
        f"checkpoint {checkpoint} was deleted while it was read, by the run that trains: try again, or with the --step"
        " of one that checkpoint.keep_every keeps"
    )


def _export(checkpoint: Path, out: Path, partial: Path, *, form: str, dtype: str) -> None:
    """Write `out` from a checkpoint that has been verified; Damaged or RunError if it is not what it was."""
    try:
        manifest = read_manifest(checkpoint)
        config = model_config(manifest)
        shards = Shards.open(checkpoint)
        source = source_of(checkpoint, manifest, config, dtype)
    except OSError as error:
        raise Damaged(str(error)) from None
    model = pretrained.empty(config)
    shapes = pretrained.stored_shapes(model)
    _check_weights(checkpoint, shards, shapes)
    try:
        partial.mkdir(parents=True)
        try:
            _check_room(partial, shapes, DTYPES[dtype])
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


def choose(run: Path, step: int | None, check: Callable[[Manifest], None] | None = None) -> Path:
    """The checkpoint of `step`, or the newest one, that verifies. Broken ones stay as they are: a training may run.

    Args:
        check: called with the manifest before a checkpoint is read as a whole; may raise.

    Raises:
        UserError: there is none.
    """
    if not run.is_dir() or not (run / "checkpoints").is_dir():
        raise UserError(f"{run} is no run directory: give <run.root>/<run.name>, which holds `checkpoints/`")
    found = list_checkpoints(run / "checkpoints")
    if not found:
        broken = ", ".join(sorted(path.name for path in (run / "checkpoints").glob("step-*.broken*")))
        why = f"no checkpoint that is whole, only {broken}" if broken else "no checkpoint yet: train it first"
        raise UserError(f"{run} has {why}")
    if step is not None and step not in map(step_of, found):
        steps = ", ".join(str(step_of(path)) for path in reversed(found))
        raise UserError(f"{run} has no checkpoint of step {step}: there are {steps}")
    asked = [path for path in found if step is None or step_of(path) <= step]
    damaged: list[str] = []
    for path in asked:
        damage = _damage(path, check)
        if damage and not path.exists():  # a run that trains has deleted it
            if step_of(path) == step:
                return choose(run, step, check)  # which says so
            continue
        if damage is None and (step is None or step_of(path) == step):
            return path
        if damage is None:
            raise UserError(f"{damaged[0]}: --step {step_of(path)} is whole")
        damaged.append(f"checkpoint {path} is broken ({damage})")
        if step is None:
            print(f"megabase: {damaged[-1]}; trying the one before", file=sys.stderr)
    if not damaged:
        return choose(run, step, check)  # all were deleted meanwhile: there are others
    raise UserError(
        f"{damaged[0]}, and there is no older one that is whole: `megabase checkpoints {run}` lists them"
    )


def model_config(manifest: Manifest) -> ReformerConfig:
    """The settings of a checkpoint's model. Raises ConfigError for one that is unknown or cannot work."""
    prefix = "model."
    settings = {
        key.removeprefix(prefix): value for key, value in manifest.config.items() if key.startswith(prefix)
    }
    return ReformerConfig.from_dict(settings)


def source_of(checkpoint: Path, manifest: Manifest, config: ReformerConfig, dtype: str) -> dict[str, Any]:
    """What an export says of where it comes from."""
    known = {Alphabet.named(name).vocab_size: name for name in ALPHABETS}
    return {
        "alphabet": known.get(config.vocab_size or 0),
        "dtype": dtype,
        "step": manifest.step,
        "samples": manifest.samples,
        "checkpoint": str(checkpoint.absolute()),
        "manifest_sha256": checksum(checkpoint / MANIFEST),
        "trained_with": manifest.versions,
        "exported_with": versions(),
    }


def _damage(path: Path, check: Callable[[Manifest], None] | None) -> str | None:
    """What is wrong with a checkpoint, in one line."""
    try:
        if check:
            check(read_manifest(path))
        return verify(path)
    except Damaged as damage:
        return str(damage)
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error}") from None


def _check_maps(manifest: Manifest) -> None:
    check_convertible(model_config(manifest))


def _check_weights(checkpoint: Path, shards: Shards, shapes: Mapping[str, torch.Size]) -> None:
    """Raise RunError unless the checkpoint has the weights of the model that its manifest describes."""
    held = {name.removeprefix(PREFIX): shards.shapes[name] for name in shards.names}
    if differing := sorted(name for name in {*held, *shapes} if held.get(name) != shapes.get(name)):
        name = differing[0]
        raise RunError(
            f"checkpoint {checkpoint} is not of the model that its manifest describes: {name} has the shape"
            f" {held.get(name)}, not {shapes.get(name)}: take another checkpoint"
        )


def _check_room(directory: Path, shapes: Mapping[str, torch.Size], dtype: torch.dtype) -> None:
    wanted = sum(shape.numel() for shape in shapes.values()) * dtype.itemsize
    free = shutil.disk_usage(directory).free
    if free < wanted:
        raise RunError(
            f"{directory.parent} has {free:,} bytes free, but the weights need {wanted:,}: make room"
        )


def _pieces(shards: Shards, name: str, shape: torch.Size) -> Iterator[Tensor]:
    for start in range(0, shape.numel(), PIECE):
        yield shards.read(PREFIX + name, "fp32", start, min(start + PIECE, shape.numel()))


def _write(
    partial: Path,
    shards: Shards,
    shapes: Mapping[str, torch.Size],
    dtype: torch.dtype,
    config: dict[str, Any],
) -> None:
    def read(name: str) -> Iterator[Tensor]:
        return _pieces(shards, name, shapes[name])

    safetensors.write(partial / pretrained.WEIGHTS, shapes, dtype, read, {"format": "pt"})
    (partial / pretrained.CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def _write_huggingface(
    partial: Path,
    model: Reformer,
    shards: Shards,
    shapes: Mapping[str, torch.Size],
    dtype: torch.dtype,
    source: dict[str, Any],
) -> None:
    weights = {name: shards.read(PREFIX + name).view(shape).to(dtype) for name, shape in shapes.items()}
    theirs = to_huggingface(pretrained.filled(model, weights).eval())
    theirs.save_pretrained(partial)
    (partial / SOURCE).write_text(json.dumps(source, indent=2) + "\n")


def _publish(partial: Path, out: Path) -> None:
    """Bring everything to disk and give it its name."""
    for path in (*partial.iterdir(), partial):
        sync(path)
    if out.exists():  # an empty directory would be replaced
        raise UserError(f"{out} has come to exist meanwhile: choose another OUT")
    partial.rename(out)
    sync(out.absolute().parent)
