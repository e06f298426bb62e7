"""Sharded checkpoints: publish, verify, choose.

DeepSpeed's ranks write their files into `step-N.partial/` and checksum them meanwhile (`checkpoint_engine.py`); rank 0
writes `megabase.json` (step, ranks, stage, config, and size and checksum of every file), everything is synced to disk,
and the directory gets its name. So a directory called `step-N` was whole when it was named. A reader checks it
again, all ranks together, and falls back to the one before, loudly.
"""

from __future__ import annotations

import platform
import shutil
import sys
from pathlib import Path
from typing import Any, TypeVar

from megabase.datamodules.files import sync
from megabase.pipeline.checkpoint.manifest import (
    MANIFEST,
    Damaged,
    Manifest,
    checksum,
    damage,
    list_checkpoints,
    read_manifest,
    step_of,
    verify,
)
from megabase.pipeline.config.keys import dotted
from megabase.pipeline.config.schema import RunConfig
from megabase.pipeline.errors import RunError, UserError
from megabase.pipeline.files import is_disk_full
from megabase.pipeline.hardware import precision_of
from megabase.pipeline.ranks.groups import Group
from megabase.pipeline.rundir.environment import versions

__all__ = ["MANIFEST", "Damaged", "Manifest", "list_checkpoints", "read_manifest", "step_of", "verify"]

T = TypeVar("T")

# The directory of DeepSpeed's files within a checkpoint, and the file that names it.
TAG = "checkpoint"
LATEST = "latest"
# Settings that a checkpoint belongs to: with another value the run would be another one...
IDENTITY = ("model.", "data.", "run.seed")
# ...but for these, which change where and how fast it is computed.
FREE = (
    "data.shards",
    "data.micro_batch",
    "data.workers",
    "data.prefetch",
    "data.on_error",
    "model.loss_chunk",
    "model.feedforward.chunk",
)


class DiskFull(RunError):
    """There is no room to write a checkpoint."""


def manifest_of(config: RunConfig, step: int, ranks: int, data: str) -> Manifest:
    """What a checkpoint of this run at `step` says; `data` is the identity of the shards. Without files yet."""
    return Manifest(
        step=step,
        samples=step * config.data.global_batch,
        ranks=ranks,
        stage=config.zero.stage,
        precision=precision_of(config.trainer.precision),
        config=dotted(config),
        data=data,
        versions=versions(),
    )


def partial_directory(checkpoints: Path, step: int) -> Path:
    """Where step `step` is written before it is whole."""
    return checkpoints / f"step-{step}.partial"


def published(partial: Path) -> Path:
    """The name that a partial directory gets."""
    return partial.with_suffix("")


def describe(
    partial: Path,
    manifest: Manifest,
    ranks: Group,
    files: dict[Path, dict[str, Any]],
    error: Exception | None = None,
) -> None:
    """The first half of publishing a checkpoint, of all ranks: what each has written goes into the manifest.

    Args:
        partial: the directory that every rank has written.
        files: size and sha256 of this rank's, which are on disk. error: why not all of them could be written.

    Raises:
        DiskFull, RunError: on every rank, if any passes an error.
    """
    mine = {path.relative_to(partial).as_posix(): what for path, what in files.items()}
    for part in agree(ranks, error, mine):
        manifest.files.update(part)


def seal(partial: Path, manifest: Manifest) -> None:
    """The second half, of rank 0 alone: write the manifest, and give the directory its name. Raises OSError."""
    final = published(partial)
    _write_synced(partial / MANIFEST, manifest.sealed())
    for directory in {path.parent for path in partial.rglob("*")}:
        sync(directory)
    if final.exists():
        set_aside(final)
    partial.rename(final)
    sync(final.parent)


def agree(ranks: Group, error: BaseException | None, told: T | None = None) -> list[T]:
    """What every rank has told, in the order of ranks.

    Raises:
        DiskFull, RunError: on every rank, if any passes an error; DiskFull if all are of that kind.
    """
    wrong = None
    if error:
        said = str(error) if isinstance(error, (OSError, RunError)) else f"{type(error).__name__}: {error}"
        wrong = (said, is_disk_full(error), isinstance(error, OSError))
    found = ranks.gather((wrong, told))
    errors = {rank: wrong for rank, (wrong, _) in enumerate(found) if wrong}
    if errors:
        said = "; ".join(f"rank {rank}: {text}" for rank, (text, _, _) in errors.items())
        if all(full for _, full, _ in errors.values()):
            raise DiskFull(said)
        raise RunError(said, temporary=all(of_a_disk for _, _, of_a_disk in errors.values()))
    return [value for _, value in found]


def choose(checkpoints: Path, ranks: Group) -> tuple[Path, Manifest] | None:
    """The newest checkpoint that verifies, or None if there never was one; all ranks get the same answer.

    Ranks share the work of checking. One whose content is damaged is renamed to `step-N.broken` and named on
    stderr, and the one before it is tried.

    Raises:
        RunError: a rank cannot read what another can, or reading fails for a reason other than the content: the
            file system needs a look, and nothing is renamed.
        UserError: checkpoints were there and none is whole. Starting again from step 0 is not for us to decide.
    """
    for path in ranks.broadcast(list_checkpoints(checkpoints) if ranks.rank == 0 else None):
        mine = unreadable = None
        try:
            mine = damage(path, ranks.rank, ranks.size)
        except OSError as caught:
            unreadable = f"{platform.node()}: {path} cannot be read: {caught}"
        ranks.check(unreadable, temporary=True)
        damages = {rank: found for rank, found in enumerate(ranks.gather(mine)) if found}
        if not damages:
            return path, read_manifest(path)
        ranks.check(_put_aside(path, damages) if ranks.rank == 0 else None, temporary=True)
    broken = ranks.broadcast(sorted(p.name for p in checkpoints.glob("step-*.broken*")))
    if broken:
        raise UserError(
            f"no checkpoint in {checkpoints} is whole ({', '.join(broken)}): copy one that is there as step-N, or start"
            " again from step 0 with another run.name"
        )
    return None


def _put_aside(path: Path, damages: dict[int, str]) -> str | None:
    """On rank 0: rename a damaged checkpoint and say so; returns why not, if not."""
    rank, found = next(iter(damages.items()))
    try:
        # Is it damaged from here, too, or does another node see another disk?
        if rank != 0 and verify(path) is None:
            return f"rank {rank} finds {path} broken ({found}), this rank does not: check the file system"
        moved = set_aside(path)
    except OSError as error:
        return f"{path} is broken ({found}) and cannot be set aside: {error}"
    print(f"megabase: checkpoint {path} is broken ({found}); kept as {moved.name}", file=sys.stderr)
    return None


def check_same_run(manifest: Manifest, now: Manifest, path: Path) -> None:
    """Compare what a checkpoint belongs to with the run that wants to resume from it.

    Args:
        now: what a checkpoint of that run would say (`manifest_of`).

    Raises:
        UserError: they differ; the message shows each difference.
    """
    # What a checkpoint that was written before a setting existed had: its default.
    told = manifest.config
    defaults = dotted(RunConfig()).items()
    then = {
        key: value for key, value in defaults if not any(name.startswith(f"{key}.") for name in told)
    } | told
    keys = sorted(k for k in {*then, *now.config} if k.startswith(IDENTITY) and k not in FREE)
    differences = [
        f"{key}: checkpoint {then.get(key)!r}, config {now.config.get(key)!r}"
        for key in keys
        if then.get(key) != now.config.get(key)
    ]
    if manifest.data != now.data:
        differences.append(
            f"the shards: checkpoint's {then.get('data.shards')} holds other records or splits than"
            f" {now.config.get('data.shards')}"
        )
    if manifest.precision != now.precision:
        differences.append(f"trainer.precision: checkpoint {manifest.precision}, now {now.precision}")
    if differences:
        raise UserError(
            f"the config differs from checkpoint {path}: {'; '.join(differences)}."
            " Use the checkpoint's values, or another run.name for a new run"
        )


def clean(checkpoints: Path) -> None:
    """Remove what earlier processes left half written or half deleted. Only while the run is locked."""
    for pattern in ("step-*.partial", "step-*.deleting"):
        for path in checkpoints.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def set_aside(path: Path) -> Path:
    """Rename a directory to `<name>.broken`, `<name>.broken-1`, ...: nothing is lost, nobody takes it for whole."""
    target = path.with_name(path.name + ".broken")
    number = 0
    while target.exists():
        number += 1
        target = path.with_name(f"{path.name}.broken-{number}")
    path.rename(target)
    return target


def synced(path: Path) -> dict[str, Any]:
    """Size and checksum of a file that is on disk."""
    sync(path)
    return {"size": path.stat().st_size, "sha256": checksum(path)}


def _write_synced(path: Path, text: str) -> None:
    path.write_text(text)
    sync(path)
