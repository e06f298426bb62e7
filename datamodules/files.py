"""What is on disk, and stays there when the power goes."""

import json
import os
from pathlib import Path
from typing import Any


def publish(path: Path, content: bytes) -> None:
    """Give a file this content, all of it or none, on disk when this returns. Raises OSError."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(content)
    sync(partial)
    partial.rename(path)
    sync(path.parent)


def publish_json(path: Path, value: Any, indent: int | None = None) -> None:
    """Give a file one JSON value as its content, as `publish` does."""
    publish(path, f"{json.dumps(value, indent=indent)}\n".encode())


def sync(path: Path) -> None:
    """Wait until a file's content, or a directory's entries, are on disk. Raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
