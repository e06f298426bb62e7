"""What a checkpoint says of itself, read with suspicion: `megabase.json`, and the files that it names.

A manifest is JSON that anybody may have written. Nothing in here trusts it: every field has its type and range, no
name leads out of the directory, neither by its letters nor by a link, and DeepSpeed finds no file that the manifest
does not answer for. What is wrong with a checkpoint is told in one line. Imports nothing heavy: `megabase
checkpoints` lists a run while torch would still be loading.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import re
import time
import types
import typing
from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import Any

from megabase.pipeline.errors import UserError

MANIFEST = "megabase.json"
MANIFEST_VERSION = 2
# A manifest has about 200 bytes for each file: this is room for a hundred thousand ranks.
MOST_MANIFEST_BYTES = 64 << 20
# Files that tell DeepSpeed which of a directory's others to read, by the name of a folder in there.
POINTERS = ("latest", "latest_universal")
_LARGEST = 2**63
_CHUNK_BYTES = 4 << 20
_PUBLISHED = re.compile(r"step-(0|[1-9][0-9]*)")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass
class Manifest:
    """What a checkpoint says of itself.

    samples: windows consumed so far. config: flattened. data: identity of the shards (`Segments.identity`).
    created: Unix time. files: {path: {size, sha256}}. seal: SHA-256 of all the rest, as `sealed` writes it.
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
    seal: str = ""

    def sealed(self) -> str:
        """The manifest as JSON, with its seal."""
        return json.dumps(asdict(self) | {"seal": seal_of(asdict(self))}, indent=1, sort_keys=True)

    @property
    def size(self) -> int:
        """Bytes of all files, without the manifest's own."""
        return sum(int(entry["size"]) for entry in self.files.values())


class Damaged(Exception):
    """A checkpoint's content is not what was written."""


def list_checkpoints(checkpoints: Path) -> list[Path]:
    """Published checkpoints, newest first."""
    found = [path for path in checkpoints.glob("step-*") if _PUBLISHED.fullmatch(path.name)]
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """The step of a published checkpoint."""
    return int(checkpoint.name.removeprefix("step-"))


def read_manifest(path: Path) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        Damaged: it is missing, torn, holds what no manifest holds, names files outside its directory, or is of
            another step than the directory's name says.
        UserError: a newer megabase wrote it.
        OSError: it cannot be read.
    """
    content = _read_json(path / MANIFEST)
    version = content.get("version")
    if not isinstance(version, int) or not _fits(version, int) or version < 1:
        raise Damaged(f"{MANIFEST} has no version: {_shown(version)}")
    # Before the fields: a newer version may have others.
    # Manifests had no seal before version 2.
    intact = version < 2 or content.get("seal") == seal_of(content)
    if version > MANIFEST_VERSION and intact:
        raise UserError(
            f"{path} was written by a newer megabase (manifest version {version}; this one reads up to"
            f" {MANIFEST_VERSION}): update megabase"
        )
    _check_fields(content)
    manifest = Manifest(**content)
    if not intact:
        raise Damaged(f"{MANIFEST} is not as it was written")
    if _PUBLISHED.fullmatch(path.name) and step_of(path) != manifest.step:
        raise Damaged(f"{MANIFEST} is of step {manifest.step}")
    return manifest


def seal_of(content: dict[str, Any]) -> str:
    """SHA-256 of a manifest's fields, but for the seal itself."""
    rest = {name: value for name, value in content.items() if name != "seal"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def glance(path: Path) -> str | None:
    """What is wrong with a checkpoint as far as names and sizes tell, in one line; None: nothing.

    Raises: as `damage`.
    """
    return _told(lambda: _check_names(path, read_manifest(path)))


def damage(path: Path, rank: int, size: int, report: Callable[[int], None] | None = None) -> str | None:
    """What is wrong with rank `rank`'s share of a checkpoint, in one line; None: nothing.

    The ranks share the files, largest first, and compare each with its checksum. The names are rank 0's.

    Args:
        report: is told the bytes read, as they are read.

    Raises:
        UserError: a newer megabase wrote it.
        OSError: something cannot be read. A file that is not there is damage, not an error.
    """

    def check() -> None:
        manifest = read_manifest(path)
        if rank == 0:
            _check_names(path, manifest)
        by_size = sorted(manifest.files.items(), key=lambda item: (-item[1]["size"], item[0]))
        for name, expected in by_size[rank::size]:
            _check_size(path, name, expected["size"])
            if checksum(path / name, report) != expected["sha256"]:
                raise Damaged(f"{name} has another checksum than when it was written")

    return _told(check)


def verify(path: Path) -> str | None:
    """Check one checkpoint completely; the damage in one line, or None when it is whole.

    Raises: as `damage`.
    """
    return damage(path, 0, 1)


def checksum(path: Path, report: Callable[[int], None] | None = None) -> str:
    """SHA-256 of a file's content, in hexadecimal. Raises OSError; `report` is told the bytes read."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            if report:
                report(count)
    return digest.hexdigest()


def _told(check: Callable[[], None]) -> str | None:
    """The damage that a check finds, as text."""
    try:
        check()
    except Damaged as damaged:
        return str(damaged)
    return None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            text = file.read(MOST_MANIFEST_BYTES + 1)
    except FileNotFoundError:
        raise Damaged(f"{MANIFEST} is missing") from None
    except (IsADirectoryError, NotADirectoryError) as error:
        raise Damaged(f"{MANIFEST} is no file in a directory ({error.strerror})") from None
    if len(text) > MOST_MANIFEST_BYTES:
        raise Damaged(f"{MANIFEST} cannot be read: it has more than {MOST_MANIFEST_BYTES >> 20} MiB")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{MANIFEST} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise Damaged(f"{MANIFEST} cannot be read: {_shown(content)} instead of fields")
    return content


def _check_fields(content: dict[str, Any]) -> None:
    """Raise Damaged for a field that is missing, unknown, or of another type or range than a manifest's."""
    hints = typing.get_type_hints(Manifest)
    for unknown in sorted(content.keys() - hints.keys())[:1]:
        raise Damaged(f"{MANIFEST} has a field that no manifest has: {_shown(unknown)}")
    for known in fields(Manifest):
        optional = known.default is not MISSING or known.default_factory is not MISSING
        if known.name not in content and not optional:
            raise Damaged(f"{MANIFEST} lacks the field {known.name!r}")
        if known.name in content and not _fits(content[known.name], hints[known.name]):
            raise Damaged(
                f"{MANIFEST} has a field that cannot be: {known.name}={_shown(content[known.name])}"
            )
    if content["ranks"] < 1 or content["stage"] > 3:
        raise Damaged(
            f"{MANIFEST} has fields that cannot be: ranks={content['ranks']}, stage={content['stage']}"
        )
    for name, entry in content.get("files", {}).items():
        _check_entry(name, entry)


def _fits(value: object, hint: Any) -> bool:
    """Whether a value of JSON is what a field's type says. Numbers count something: none is negative."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in inner)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(each, inner[1]) for each in value.values())
    if origin is list:
        return isinstance(value, list) and all(_fits(each, inner[0]) for each in value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _LARGEST
    if hint is float:
        return _fits(value, int) or (isinstance(value, float) and math.isfinite(value) and value >= 0)
    return isinstance(value, hint)


def _check_entry(name: str, entry: dict[str, Any]) -> None:
    """Raise Damaged for a file whose name leads elsewhere, or whose size or checksum is none."""
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts:
        raise Damaged(f"{MANIFEST} names a file outside its directory: {_shown(name)}")
    plain = (
        name.isprintable() and "\\" not in name and name == pure.as_posix() and name not in (".", MANIFEST)
    )
    if not plain or any(len(part.encode()) > 255 for part in pure.parts) or len(name) > 2048:
        raise Damaged(f"{MANIFEST} names a file as no file of a checkpoint is named: {_shown(name)}")
    if entry.keys() != {"size", "sha256"} or not _fits(entry["size"], int):
        raise Damaged(f"{MANIFEST} does not say size and checksum of {name}: {_shown(entry)}")
    if not isinstance(entry["sha256"], str) or not _SHA256.fullmatch(entry["sha256"]):
        raise Damaged(f"{MANIFEST} has no checksum of {name}: {_shown(entry['sha256'])}")


def _check_names(path: Path, manifest: Manifest) -> None:
    """Raise Damaged unless all files are there, in there, as long as they were, and no other one would be loaded."""
    if not manifest.files:
        raise Damaged(f"{MANIFEST} names no files")
    for name, expected in manifest.files.items():
        _check_size(path, name, expected["size"])
    for found in sorted(path.rglob("*")):
        name = found.relative_to(path).as_posix()
        if (found.suffix == ".pt" or name in POINTERS) and name not in manifest.files:
            raise Damaged(f"{name} is there, but {MANIFEST} does not name it")
    for pointer in set(POINTERS) & set(manifest.files):
        with (path / pointer).open("rb") as file:
            target = file.read(256).decode(errors="replace").strip()
        if not any(name.startswith(f"{target}/") for name in manifest.files) or "/" in target:
            raise Damaged(f"{pointer} points to {_shown(target)}, which is no folder of the checkpoint")


def _check_size(path: Path, name: str, expected: int) -> None:
    """Raise Damaged unless a file is there, lies in the checkpoint's directory, and has so many bytes."""
    try:
        real = (path / name).resolve(strict=True)
        # The size, too, before a checksum: a truncated file should not cost reading the whole of it.
        actual = real.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        raise Damaged(f"{name} is missing") from None
    except (RuntimeError, OSError) as error:
        # Of links in a circle, Python says the one before 3.13 and the other since.
        if isinstance(error, OSError) and error.errno != errno.ELOOP:
            raise
        raise Damaged(f"{name} is a link to itself") from None
    if not real.is_relative_to(path.resolve()):
        raise Damaged(f"{name} is a link that leads out of the checkpoint, to {real}")
    if not real.is_file():
        raise Damaged(f"{name} is not a file")
    if actual != expected:
        raise Damaged(f"{name} has {actual} bytes instead of {expected}")


def _shown(value: object) -> str:
    """A value from outside, for a message of one line."""
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
