"""Sizes of directories, errors of a full disk, and small files of JSON."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

_FULL = (errno.ENOSPC, errno.EDQUOT)


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, or one of the errors that caused it, says that a disk or a quota is full."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        error = error.__cause__ or error.__context__
    return False


def directory_size(path: Path) -> int:
    """Bytes of all files in a directory and below. Files that are deleted meanwhile do not count."""
    total = 0
    for folder, _, names in os.walk(path):
        for name in names:
            try:
                total += os.lstat(os.path.join(folder, name)).st_size  # noqa: PTH118
            except FileNotFoundError:
                continue
    return total


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if there is no file, or it cannot be read, or holds anything else."""
    try:
        return as_object(path.read_bytes())
    except OSError:
        return {}


def as_object(content: bytes) -> dict[str, Any]:
    """The JSON object that bytes hold; empty if they hold anything else."""
    try:
        found = json.loads(content)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
