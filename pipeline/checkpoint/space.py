"""Room for a checkpoint: what it needs, whether the disk has it, and how to tell a full disk from another trouble.

Looked up before anything is written. Quotas do not show there, and others write to the disk as well: so a disk may
still be full in the middle of a checkpoint, which is then removed to give its room back.
"""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

from megabase.pipeline.checkpoint.manifest import (
    Damaged,
    Manifest,
    list_checkpoints,
    read_manifest,
)
from megabase.pipeline.errors import UserError
from megabase.pipeline.files import directory_size, readable_size

# AdamW in fp32: the weights and two moments.
_STATES_BYTES = 12
# Left to the journal and the logs, beside what a checkpoint needs.
_SPARE_BYTES = 4 << 20


def lacking(checkpoints: Path, parameters: int, stage: int, precision: str) -> str | None:
    """Why the next checkpoint of a run cannot be written for want of room, with the way out; None if it can.

    For one rank to ask, and to tell the others: raises nothing.

    Args: as `needed`. checkpoints: the run's directory of them.
    """
    before = None
    with suppress(Damaged, UserError, OSError):
        for path in list_checkpoints(checkpoints)[:1]:
            before = read_manifest(path)
    try:
        return shortage(checkpoints, needed(parameters, stage, precision, before))
    except OSError as error:
        return f"{checkpoints} does not say how much room it has: {error}"


def needed(parameters: int, stage: int, precision: str, before: Manifest | None = None) -> int:
    """Bytes that the next checkpoint of a run takes at most, files of all ranks together.

    Args:
        parameters: of the model. stage: of ZeRO. precision: '32', 'bf16' or '16'.
        before: the manifest of the run's last checkpoint, if there is one: that tells best what the next will be.
    """
    if before is not None and (before.stage, before.precision) == (stage, precision):
        estimate = before.size
    else:
        # Below stage 3, rank 0 writes the weights as the model holds them, as well.
        weights = 0 if stage == 3 else 4 if precision == "32" else 2
        estimate = parameters * (_STATES_BYTES + weights)
    return estimate + estimate // 50 + _SPARE_BYTES


def shortage(checkpoints: Path, wanted: int) -> str | None:
    """Why the disk of a run has no room for `wanted` bytes, with the way out; None if it has.

    Raises:
        OSError: the file system does not answer.
    """
    free = shutil.disk_usage(checkpoints).free
    if free >= wanted:
        return None
    said = f"a checkpoint needs up to {readable_size(wanted)}, {checkpoints} has {readable_size(free)} free: make room"
    broken = sorted(path for path in checkpoints.glob("step-*.broken*") if path.is_dir())
    if broken:
        size = sum(map(directory_size, broken))
        names = ", ".join(path.name for path in broken[:3]) + ", ..." * (len(broken) > 3)
        said += f" (broken checkpoints that nobody deletes by itself hold {readable_size(size)}: {names})"
    return f"{said}, or keep fewer (checkpoint.keep, checkpoint.keep_every, checkpoint.keep_best)"
