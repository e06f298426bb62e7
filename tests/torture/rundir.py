"""A run directory read without the code under test."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any


class Failed(Exception):
    """A check of the torture test failed; the message says which."""


def published(run: Path) -> list[Path]:
    """Checkpoints under their own name, newest first."""
    found = [path for path in (run / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    return int(checkpoint.name.split(".")[0].removeprefix("step-"))


def damage_of(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, found without the code under test; None if nothing is."""
    try:
        files = json.loads((checkpoint / "megabase.json").read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its manifest: {error!r}"
    for name, expected in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if hashlib.sha256(path.read_bytes()).hexdigest() != expected["sha256"]:
            return f"{name} is not what the manifest says"
    return None if files else "it has no files"


def names_in(directory: Path) -> set[str]:
    try:
        return set(os.listdir(directory))  # noqa: PTH208
    except FileNotFoundError:
        return set()


def modified(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""


def rows(content: bytes) -> list[dict[str, Any]]:
    """The rows of complete lines."""
    return [json.loads(line) for line in complete_lines(content).splitlines()]


def complete_lines(content: bytes) -> bytes:
    """Without half a line at the end."""
    return content[: content.rfind(b"\n") + 1]


def is_unfinished(name: str) -> bool:
    return name.endswith((".partial", ".deleting"))


def summary_of(directory: Path) -> str:
    files = [path for path in directory.rglob("*") if path.is_file()]
    manifest = " and its manifest" if (directory / "megabase.json").exists() else ""
    return f"{len(files)} files{manifest}"


def bytes_of(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
