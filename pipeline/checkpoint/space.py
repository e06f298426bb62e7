"""How much disk space a checkpoint needs, and whether the disk has it.

This is checked before a checkpoint is written. The check does not see quotas, and other processes write to the disk as
well. So the disk may still fill up while a checkpoint is written; the checkpoint is then removed to free its space.
"""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

from megabase.pipeline.checkpoint.manifest import Damaged, Manifest, list_checkpoints, read_manifest
from megabase.pipeline.config.schema import CheckpointConfig
from megabase.pipeline.errors import UserError
from megabase.pipeline.files import directory_size
from megabase.pipeline.readable import readable_size

# AdamW in fp32: the weights and two moments.
_STATES_BYTES = 12
# Kept free for the journal and the logs, in addition to what a checkpoint needs.
_SPARE_BYTES = 4 << 20


def describe_shortage(checkpoints: Path, parameters: int, stage: int, precision: str) -> str | None:
    """Why the disk has no space for the next checkpoint of a run, with the way out; None if the space suffices.

    Call it on one rank and broadcast the result: it raises nothing.

    Args:
        checkpoints: directory of the run's checkpoints.
        parameters: number of parameters of the model.
        stage: ZeRO stage.
        precision: '32', 'bf16' or '16'.
    """
    last = None
    with suppress(Damaged, UserError, OSError):
        for path in list_checkpoints(checkpoints)[:1]:
            last = read_manifest(path)
    try:
        return shortage(checkpoints, needed_bytes(parameters, stage, precision, last))
    except OSError as error:
        return f"the free space of {checkpoints} is unknown: {error}"


def check_space(
    checkpoints: Path, kept: CheckpointConfig, max_steps: int, parameters: int, stage: int, precision: str
) -> str:
    """Check that a disk has space for all checkpoints that a run will keep.

    Args:
        checkpoints: directory of the run's checkpoints, which need not exist.
        kept: which are kept.
        max_steps: of the run.
        parameters, stage, precision: as for `needed_bytes`.

    Returns:
        How much they are, and how much space there is, in one line.

    Raises:
        UserError: there is less.
    """
    # A new checkpoint is complete before an old one is deleted.
    number = kept.keep + 1 + kept.keep_best + (max_steps // kept.keep_every if kept.keep_every else 0)
    each = needed_bytes(parameters, stage, precision)
    existing = next(path for path in (checkpoints, *checkpoints.parents) if path.exists())
    here = sum(directory_size(path) for path in list_checkpoints(checkpoints))
    need = f"up to {number} checkpoints of {readable_size(each)}, {readable_size(number * each)} together"
    try:
        free = shutil.disk_usage(existing).free
    except OSError as error:
        return f"{need}; the free space of {existing} is unknown: {error.strerror}"
    if number * each > free + here:
        raise UserError(
            f"the run keeps {need}, and {existing} has {readable_size(free)} free: make room, choose another"
            " run.root, or keep fewer (checkpoint.keep, checkpoint.keep_every, checkpoint.keep_best)"
        )
    return f"{need}; {readable_size(free)} free in {existing}"


def needed_bytes(parameters: int, stage: int, precision: str, last: Manifest | None = None) -> int:
    """Bytes that the next checkpoint of a run needs at most, files of all ranks together.

    Args:
        parameters: number of parameters of the model.
        stage: ZeRO stage.
        precision: '32', 'bf16' or '16'.
        last: the manifest of the run's last checkpoint, if there is one. If its stage and precision are the same, the
            next one has its size.
    """
    estimate = expected_bytes(parameters, stage, precision)
    if last is not None and (last.stage, last.precision) == (stage, precision):
        estimate = last.size
    return estimate + estimate // 50 + _SPARE_BYTES


def expected_bytes(parameters: int, stage: int, precision: str) -> int:
    """Bytes of a checkpoint, files of all ranks together, beside small ones. Arguments as for `needed_bytes`."""
    # Below stage 3, rank 0 also writes the weights that the forward pass uses.
    weights = 0 if stage == 3 else 4 if precision == "32" else 2
    return parameters * (_STATES_BYTES + weights)


def shortage(checkpoints: Path, needed: int) -> str | None:
    """Why the disk of a run has no space for `needed` bytes, with the way out; None if the space suffices.

    Raises:
        OSError: the file system does not answer.
    """
    free = shutil.disk_usage(checkpoints).free
    if free >= needed:
        return None
    sizes = f"needs up to {readable_size(needed)}, {checkpoints} has {readable_size(free)} free"
    message = f"a checkpoint {sizes}: make room"
    broken = sorted(path for path in checkpoints.glob("step-*.broken*") if path.is_dir())
    if broken:
        size = readable_size(sum(map(directory_size, broken)))
        names = ", ".join(path.name for path in broken[:3]) + ", ..." * (len(broken) > 3)
        message += f" (broken checkpoints, which are never deleted automatically, take {size}: {names})"
    return f"{message}, or keep fewer (checkpoint.keep, checkpoint.keep_every, checkpoint.keep_best)"
