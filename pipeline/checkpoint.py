"""Sharded checkpoints: publish, verify, choose, keep.

DeepSpeed's ranks write their files into `step-N.partial/`; every rank checksums its own; rank 0 writes
`megabase.json` (step, ranks, stage, config, and size and checksum of every file), everything is synced to disk,
and the directory gets its name. So a directory called `step-N` was whole when it was named. A reader checks it
again, all ranks together, and falls back to the one before, loudly.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline.distributed import Ranks
from pipeline.errors import UserError

MANIFEST = "megabase.json"
MANIFEST_VERSION = 1
# Settings that a checkpoint belongs to: with another value the run would be another one.
IDENTITY = ("model.", "run.seed", "data.length", "data.global_batch", "data.min_real")


@dataclass
class Manifest:
    """What a checkpoint says of itself.

    samples: windows consumed so far. config: flattened. data: identity of the shards (`Segments.identity`).
    created: Unix time. files: {path: {size, sha256}}.
    """

    step: int
    samples: int
    ranks: int
    stage: int
    precision: str
    config: dict[str, Any]
    data: str
    versions: dict[str, str]
    created: float = field(default_factory=time.time)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    version: int = MANIFEST_VERSION


def partial_directory(checkpoints: Path, step: int) -> Path:
    """Where step `step` is written before it is whole."""
    return checkpoints / f"step-{step}.partial"


def publish(partial: Path, manifest: Manifest, ranks: Ranks) -> Path:
    """Turn a directory that every rank has written into a checkpoint; all ranks call it.

    Returns:
        The published directory, `step-N`.

    Raises:
        RunError: on every rank, if any rank could not read or sync its files.
    """
    described: dict[str, dict[str, Any]] = {}
    error = None
    try:
        for path in _own_files(partial, ranks.rank, ranks.size):
            described[path.relative_to(partial).as_posix()] = _describe(path, sync=True)
    except OSError as caught:
        error = f"cannot sync checkpoint files: {caught}"
    ranks.check(error)
    for part in ranks.gather(described):
        manifest.files.update(part)
    final = partial.with_name(f"step-{manifest.step}")
    if ranks.rank == 0:
        try:
            _write_synced(partial / MANIFEST, json.dumps(asdict(manifest), indent=1, sort_keys=True))
            for directory in {path.parent for path in partial.rglob("*")}:
                _sync_directory(directory)
            if final.exists():
                set_aside(final)
            partial.rename(final)
            _sync_directory(final.parent)
        except OSError as caught:
            error = f"cannot publish {final}: {caught}"
    ranks.check(error)
    return final


def choose(checkpoints: Path, ranks: Ranks) -> tuple[Path, Manifest] | None:
    """The newest checkpoint that verifies, or None; all ranks call it and get the same answer.

    Ranks share the work of checking. A broken one is renamed to `step-N.broken` and named on stderr.
    """
    for path in ranks.broadcast(list_checkpoints(checkpoints) if ranks.rank == 0 else None):
        manifest, problem = read_manifest(path)
        problems = ranks.gather(problem or _verify(path, manifest, ranks.rank, ranks.size))
        first = next((text for text in problems if text), None)
        if first is None and manifest is not None:
            return path, manifest
        if ranks.rank == 0:
            moved = set_aside(path)
            print(f"megabase: checkpoint {path} is broken ({first}); kept as {moved.name}", file=sys.stderr)
        ranks.check(None)
    return None


def verify(path: Path) -> str | None:
    """Check one checkpoint completely; the problem in one line, or None when it is whole."""
    manifest, problem = read_manifest(path)
    return problem or _verify(path, manifest, 0, 1)


def list_checkpoints(checkpoints: Path) -> list[Path]:
    """Published checkpoints, newest first."""
    found = [p for p in checkpoints.glob("step-*") if re.fullmatch(r"step-\d+", p.name)]
    return sorted(found, key=lambda p: int(p.name.split("-")[1]), reverse=True)


def read_manifest(path: Path) -> tuple[Manifest | None, str | None]:
    """The manifest of a checkpoint, or what is wrong with it."""
    try:
        manifest = Manifest(**json.loads((path / MANIFEST).read_text()))
    except FileNotFoundError:
        return None, f"{MANIFEST} is missing"
    except (OSError, ValueError, TypeError) as error:
        return None, f"{MANIFEST} cannot be read: {error}"
    if manifest.version > MANIFEST_VERSION:
        return (
            None,
            f"{MANIFEST} has version {manifest.version}; this megabase knows up to {MANIFEST_VERSION}",
        )
    outside = [name for name in manifest.files if Path(name).is_absolute() or ".." in Path(name).parts]
    if outside:
        return None, f"{MANIFEST} names a file outside its directory: {outside[0]!r}"
    return manifest, None


def check_same_run(manifest: Manifest, config: dict[str, Any], data: str, path: Path) -> None:
    """Compare what a checkpoint belongs to with the run that wants to resume from it.

    Args:
        config: the flattened configuration, {"model.dim": 512, ...}. data: identity of the shards.

    Raises:
        UserError: they differ; the message shows each difference.
    """
    then, now = manifest.config, config
    keys = sorted(k for k in {*then, *now} if k.startswith(IDENTITY))
    differences = [
        f"{key}: checkpoint {then.get(key)!r}, config {now.get(key)!r}"
        for key in keys
        if then.get(key) != now.get(key)
    ]
    if manifest.data != data:
        differences.append(
            f"the shards: checkpoint's {then.get('data.shards')} holds other records or splits than"
            f" {now.get('data.shards')}"
        )
    if differences:
        raise UserError(
            f"the config differs from checkpoint {path}: {'; '.join(differences)}."
            " Use the checkpoint's values, or another run.name for a new run"
        )


def prune(checkpoints: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints. A reader never sees one that is half deleted."""
    for path in list_checkpoints(checkpoints)[keep:]:
        doomed = path.with_name(path.name + ".deleting")
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


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


def _own_files(partial: Path, rank: int, size: int) -> list[Path]:
    """The files that rank `rank` answers for: DeepSpeed names shards by rank; rank 0 takes all others."""
    own = []
    for path in sorted(p for p in partial.rglob("*") if p.is_file()):
        match = re.search(r"zero_pp_rank_(\d+)_", path.name)
        owner = int(match.group(1)) if match else 0
        if owner == rank or (owner >= size and rank == 0):
            own.append(path)
    return own


def _verify(path: Path, manifest: Manifest | None, rank: int, size: int) -> str | None:
    """Check this rank's share (every `size`-th file, largest first) of a checkpoint against its manifest."""
    assert manifest is not None
    by_size = sorted(manifest.files.items(), key=lambda item: (-item[1]["size"], item[0]))
    for name, expected in by_size[rank::size]:
        try:
            # The size first: a truncated file should not cost reading the whole of it.
            actual = (path / name).stat().st_size
            if actual != expected["size"]:
                return f"{name} has {actual} bytes instead of {expected['size']}"
            if _describe(path / name, sync=False)["sha256"] != expected["sha256"]:
                return f"{name} has another checksum than when it was written"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return None


def _describe(path: Path, sync: bool) -> dict[str, Any]:
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"size": file.tell(), "sha256": digest}


def _write_synced(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
