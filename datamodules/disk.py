"""What is on disk, and stays there when the power goes."""

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Wait until a file's content, or a directory's entries, are on disk. Raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
