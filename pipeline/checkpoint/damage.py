"""Finding damage in a checkpoint: its files are compared with its manifest.

A link that leads out of the directory is damage, and so is a file that DeepSpeed would read and the manifest does not
name. This module imports nothing heavy.
"""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Callable
from pathlib import Path

from megabase.pipeline.checkpoint.manifest import MANIFEST, Damaged, Manifest, read_manifest, shown

# Each of these files contains the name of a folder in the checkpoint, whose files DeepSpeed reads.
POINTERS = ("latest", "latest_universal")
_CHUNK_BYTES = 4 << 20


def find_damage(
    path: Path, *, rank: int = 0, size: int = 1, report: Callable[[int], None] | None = None
) -> str | None:
    """Compare every file of a checkpoint with its checksum.

    Several ranks may share the files, largest first. Rank 0 also checks the names of all files.

    Args:
        path: the checkpoint's directory.
        rank: number of this process among those that share the files.
        size: number of these processes.
        report: called with the number of bytes read, as they are read.

    Returns:
        The damage, in one line; None if this rank found none.

    Raises:
        UserError: a newer megabase wrote the checkpoint.
        OSError: something cannot be read. (A missing file is damage and raises no error.)
    """
    try:
        manifest = read_manifest(path)
        if rank == 0:
            _check_names_and_sizes(path, manifest)
        by_size = sorted(manifest.files.items(), key=lambda item: (-item[1]["size"], item[0]))
        for name, expected in by_size[rank::size]:
            _check_size(path, name, expected["size"])
            if checksum(path / name, report) != expected["sha256"]:
                raise Damaged(f"{name} has another checksum than when it was written")
    except Damaged as damage:
        return str(damage)
    return None


def find_obvious_damage(path: Path) -> str | None:
    """Compare the names and sizes of a checkpoint's files with its manifest, without reading the files.

    Returns:
        The damage, in one line; None if there is none of this kind.

    Raises:
        UserError: a newer megabase wrote the checkpoint.
        OSError: something cannot be read.
    """
    try:
        _check_names_and_sizes(path, read_manifest(path))
    except Damaged as damage:
        return str(damage)
    return None


def checksum(path: Path, report: Callable[[int], None] | None = None) -> str:
    """SHA-256 of a file's content as hexadecimal digits; `report` is called with the bytes read. Raises OSError."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            if report:
                report(count)
    return digest.hexdigest()


def _check_names_and_sizes(path: Path, manifest: Manifest) -> None:
    """Raise Damaged unless the checkpoint has exactly the files that the manifest names, with their sizes.

    Other files may exist if DeepSpeed does not read them. Pointers must name a folder of the checkpoint.
    """
    if not manifest.files:
        raise Damaged(f"{MANIFEST} names no files")
    for name, expected in manifest.files.items():
        _check_size(path, name, expected["size"])
    for found in sorted(path.rglob("*")):
        name = found.relative_to(path).as_posix()
        if (found.suffix == ".pt" or name in POINTERS) and name not in manifest.files:
            raise Damaged(f"{name} exists, but {MANIFEST} does not name it")
    for pointer in set(POINTERS) & set(manifest.files):
        with (path / pointer).open("rb") as file:
            target = file.read(256).decode(errors="replace").strip()
        if not any(name.startswith(f"{target}/") for name in manifest.files) or "/" in target:
            raise Damaged(f"{pointer} points to {shown(target)}, which is no folder of the checkpoint")


def _check_size(path: Path, name: str, expected: int) -> None:
    """Raise Damaged unless a file exists, lies in the checkpoint's directory, and has `expected` bytes."""
    try:
        real = (path / name).resolve(strict=True)
        actual = real.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        raise Damaged(f"{name} is missing") from None
    except (RuntimeError, OSError) as error:
        # For a loop of links, Python raises RuntimeError before 3.13, and OSError since.
        if isinstance(error, OSError) and error.errno != errno.ELOOP:
            raise
        raise Damaged(f"{name} is a link to itself") from None
    if not real.is_relative_to(path.resolve()):
        raise Damaged(f"{name} is a link that leads out of the checkpoint, to {real}")
    if not real.is_file():
        raise Damaged(f"{name} is not a file")
    if actual != expected:
        raise Damaged(f"{name} has {actual} bytes instead of {expected}")
