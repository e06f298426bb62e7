"""The manifest of a checkpoint, `megabase.json`: what the checkpoint holds, with the size and checksum of every file.

Anybody may have written a manifest, so nothing in it is trusted: the type and range of every field are checked, and a
file name that leads out of the directory is refused. An error is one line. This module imports nothing heavy, so
`megabase checkpoints` need not wait until torch is imported.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import time
import types
import typing
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import Any

from megabase.models.config import BEFORE_THE_SETTING
from megabase.pipeline.errors import UserError
from megabase.pipeline.rundir.paths import PUBLISHED

MANIFEST = "megabase.json"
# Version 2 had no `alphabet`.
MANIFEST_VERSION = 3
OLDEST_VERSION = 2
_BEFORE_THE_SETTING = {f"model.{key}": value for key, value in BEFORE_THE_SETTING.items()}
# A manifest has about 200 bytes for each file: this is enough for a hundred thousand ranks.
MAX_MANIFEST_BYTES = 64 << 20
_LARGEST = 2**63
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass
class Manifest:
    """The content of a manifest.

    Attributes:
        step: optimizer steps done.
        samples: windows consumed so far.
        ranks: processes that wrote it, the world size.
        stage: ZeRO stage.
        precision: `32`, `bf16` or `16`.
        config: every setting of the run, by its dotted key.
        data: identity of the shards (`Segments.identity`).
        versions: of Python and packages, by name.
        created: Unix time.
        files: {path in the checkpoint: {"size": bytes, "sha256": hexadecimal digits}}.
        alphabet: name of the shards' alphabet; None in a checkpoint of version 2, which did not record it.
        version: version of this format.
        seal: SHA-256 of all other fields, as `sealed` writes it.
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
    alphabet: str | None = None
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
    """A checkpoint's content differs from what was written."""


def list_checkpoints(checkpoints: Path) -> list[Path]:
    """The published checkpoints in a directory, newest first."""
    found = [path for path in checkpoints.glob("step-*") if PUBLISHED.fullmatch(path.name)]
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """The step of a published checkpoint, from its name."""
    return int(checkpoint.name.removeprefix("step-"))


def read_manifest(path: Path) -> Manifest:
    """The manifest of the checkpoint in directory `path`.

    Raises:
        Damaged: it is missing or incomplete, has a field or value that no manifest has, names files outside its
            directory, differs from its seal, or is of another step than the directory's name says.
        UserError: a newer megabase wrote it.
        OSError: it cannot be read.
    """
    content = _read_json(path / MANIFEST)
    version = content.get("version")
    if not isinstance(version, int) or not _has_type(version, int) or version < OLDEST_VERSION:
        raise Damaged(f"{MANIFEST} has no released version: {shown(version)}")
    intact = content.get("seal") == seal_of(content)
    # Checked before the fields: a newer version may have others.
    if version > MANIFEST_VERSION and intact:
        raise UserError(
            f"{path} was written by a newer megabase (manifest version {version}; this one reads up to"
            f" {MANIFEST_VERSION}): update megabase"
        )
    _check_fields(content)
    manifest = Manifest(**content)
    if not intact:
        raise Damaged(f"{MANIFEST} has changed since it was written")
    if PUBLISHED.fullmatch(path.name) and step_of(path) != manifest.step:
        raise Damaged(f"{MANIFEST} is of step {manifest.step}")
    manifest.config = _BEFORE_THE_SETTING | manifest.config
    return manifest


def seal_of(content: dict[str, Any]) -> str:
    """SHA-256 of a manifest's fields, without the seal itself."""
    rest = {name: value for name, value in content.items() if name != "seal"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def shown(value: object) -> str:
    """A value from a file, for a message of one line: at most 80 ASCII characters."""
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _read_json(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            text = file.read(MAX_MANIFEST_BYTES + 1)
    except FileNotFoundError:
        raise Damaged(f"{MANIFEST} is missing") from None
    except (IsADirectoryError, NotADirectoryError) as error:
        raise Damaged(f"{MANIFEST} is not a file in a directory ({error.strerror})") from None
    if len(text) > MAX_MANIFEST_BYTES:
        raise Damaged(f"{MANIFEST} cannot be read: it has more than {MAX_MANIFEST_BYTES >> 20} MiB")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{MANIFEST} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise Damaged(f"{MANIFEST} cannot be read: {shown(content)} instead of fields")
    return content


def _check_fields(content: dict[str, Any]) -> None:
    """Raise Damaged for a field that is missing or unknown, or whose value has the wrong type or range."""
    hints = typing.get_type_hints(Manifest)
    for unknown in sorted(content.keys() - hints.keys())[:1]:
        raise Damaged(f"{MANIFEST} has a field that no manifest has: {shown(unknown)}")
    for known in fields(Manifest):
        optional = known.default is not MISSING or known.default_factory is not MISSING
        if known.name not in content and not optional:
            raise Damaged(f"{MANIFEST} lacks the field {known.name!r}")
        if known.name in content and not _has_type(content[known.name], hints[known.name]):
            raise Damaged(f"{MANIFEST} has an impossible value: {known.name}={shown(content[known.name])}")
    if content["ranks"] < 1 or content["stage"] > 3:
        raise Damaged(f"{MANIFEST} has impossible values: ranks={content['ranks']}, stage={content['stage']}")
    for name, entry in content.get("files", {}).items():
        _check_entry(name, entry)


def _has_type(value: object, hint: Any) -> bool:
    """Whether a value of JSON has a field's type. Numbers are counts or times, so they must not be negative."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_has_type(value, part) for part in inner)
    if origin is dict:
        return isinstance(value, dict) and all(_has_type(each, inner[1]) for each in value.values())
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _LARGEST
    if hint is float:
        return _has_type(value, int) or (isinstance(value, float) and math.isfinite(value) and value >= 0)
    return isinstance(value, hint)


def _check_entry(name: str, entry: dict[str, Any]) -> None:
    """Raise Damaged for a file whose name leads out of the directory, or that has no size and checksum."""
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts:
        raise Damaged(f"{MANIFEST} names a file outside its directory: {shown(name)}")
    plain = (
        name.isprintable() and "\\" not in name and name == pure.as_posix() and name not in (".", MANIFEST)
    )
    if not plain or any(len(part.encode()) > 255 for part in pure.parts) or len(name) > 2048:
        raise Damaged(f"{MANIFEST} has a file name that no checkpoint has: {shown(name)}")
    if entry.keys() != {"size", "sha256"} or not _has_type(entry["size"], int):
        raise Damaged(f"{MANIFEST} lacks size and checksum of {name}: {shown(entry)}")
    if not isinstance(entry["sha256"], str) or not _SHA256.fullmatch(entry["sha256"]):
        raise Damaged(f"{MANIFEST} has no checksum of {name}: {shown(entry['sha256'])}")
