"""Publishing a sharded checkpoint by rename, and setting a damaged one aside.

The ranks write DeepSpeed's files into `step-N.partial/`, and hash them while they write (`zero/checkpoint_engine.py`).
Rank 0 enters the size and checksum of every file into the manifest, syncs everything to disk, and renames the directory
to `step-N`. So a directory of this name was complete when it was renamed. A reader checks it again (`damage.py`).
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from megabase.datamodules.files import sync
from megabase.pipeline.checkpoint.damage import checksum
from megabase.pipeline.checkpoint.manifest import MANIFEST, Manifest
from megabase.pipeline.errors import RunError
from megabase.pipeline.files import is_disk_full

if TYPE_CHECKING:
    from megabase.pipeline.ranks.groups import Group

T = TypeVar("T")


class DiskFull(RunError):
    """The disk has no space left for a checkpoint."""


def partial_directory(checkpoints: Path, step: int) -> Path:
    """Where the checkpoint of `step` is written until it is complete."""
    return checkpoints / f"step-{step}.partial"


def published_directory(partial: Path) -> Path:
    """The directory that a partial one is renamed to."""
    return partial.with_suffix("")


def collect_files(
    partial: Path,
    manifest: Manifest,
    world: Group,
    files: dict[Path, dict[str, Any]],
    error: Exception | None = None,
) -> None:
    """Enter the files that every rank has written into the manifest. All ranks call it.

    Args:
        partial: the directory that every rank has written to.
        manifest: changed in place.
        world: every process of the run.
        files: size and sha256 of this rank's files, which are on disk.
        error: why this rank could not write all of them; None if it could.

    Raises:
        DiskFull: on every rank, if any rank passes an error and all errors are a full disk.
        RunError: on every rank, if any rank passes another error.
    """
    written = {path.relative_to(partial).as_posix(): entry for path, entry in files.items()}
    for entries in gather_or_raise(world, error, written):
        manifest.files.update(entries)


def publish(partial: Path, manifest: Manifest) -> None:
    """Write the manifest, sync the directory and rename it. For rank 0 only, after `collect_files`. Raises OSError."""
    final = published_directory(partial)
    path = partial / MANIFEST
    path.write_text(manifest.sealed())
    sync(path)
    for directory in {path.parent for path in partial.rglob("*")}:
        sync(directory)
    if final.exists():
        set_aside(final)
    partial.rename(final)
    sync(final.parent)


def gather_or_raise(world: Group, error: BaseException | None, value: T | None = None) -> list[T]:
    """The `value` of every rank, in the order of ranks. All ranks call it.

    Raises:
        DiskFull: on every rank, if any rank passes an error and all errors are a full disk.
        RunError: on every rank, if any rank passes another error; temporary if all are OSErrors.
    """
    failure = None
    if error:
        message = str(error) if isinstance(error, (OSError, RunError)) else f"{type(error).__name__}: {error}"
        failure = (message, is_disk_full(error), isinstance(error, OSError))
    gathered = world.gather((failure, value))
    failures = {rank: failure for rank, (failure, _) in enumerate(gathered) if failure}
    if failures:
        text = "; ".join(f"rank {rank}: {message}" for rank, (message, _, _) in failures.items())
        if all(full for _, full, _ in failures.values()):
            raise DiskFull(text)
        raise RunError(text, temporary=all(of_disk for _, _, of_disk in failures.values()))
    return [value for _, value in gathered]


def remove_leftovers(checkpoints: Path) -> None:
    """Remove what earlier processes left half written or half deleted. Call it only while the run is locked."""
    for pattern in ("step-*.partial", "step-*.deleting"):
        for path in checkpoints.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def set_aside(path: Path) -> Path:
    """Rename a directory to `<name>.broken`, or `<name>.broken-1` and so on, which no reader uses; returns its path."""
    target = path.with_name(path.name + ".broken")
    number = 0
    while target.exists():
        number += 1
        target = path.with_name(f"{path.name}.broken-{number}")
    path.rename(target)
    return target


def sync_and_measure(path: Path) -> dict[str, Any]:
    """Sync a file to disk; returns its size and sha256, as a manifest has them."""
    sync(path)
    return {"size": path.stat().st_size, "sha256": checksum(path)}
