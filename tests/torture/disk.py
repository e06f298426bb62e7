"""A small disk of its own for a run, and a file that fills it."""

from __future__ import annotations

import os
import shutil
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

DISK_BYTES = 192 << 20


@dataclass
class Ballast:
    """A file that fills its disk. left: bytes that it leaves free."""

    path: Path
    left: int = 0

    def fill(self, left: int) -> None:
        """Take all free space except `left` bytes."""
        self.left = left
        with self.path.open("wb") as file:
            taken = False
            while not taken:  # the run writes as well: there may be less space by then
                disk = os.statvfs(self.path.parent)
                size = disk.f_bavail * disk.f_frsize - left
                with suppress(OSError):
                    if size > 0:
                        os.posix_fallocate(file.fileno(), 0, size)
                    taken = True

    def clear(self) -> None:
        """Delete the file."""
        self.path.unlink(missing_ok=True)


def mount(disk: Path) -> str:
    """Mount a small file system on an empty directory; returns why that failed, or an empty string."""
    disk.mkdir(exist_ok=True)
    if any(disk.iterdir()):
        return f"{disk} is not empty"
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "torture", str(disk)]
    try:
        answer = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        return "there is no mount"
    return answer.stderr.strip()


def unmount(disk: Path, keep: bool) -> None:
    """Unmount the small file system; with `keep` its content stays as ordinary files."""
    kept = disk.with_name("disk.kept")
    if keep:
        shutil.copytree(disk, kept, symlinks=True)
    # Lazily: processes that were just killed may still hold a file.
    subprocess.run(["umount", "--lazy", str(disk)], check=True)
    if keep:
        disk.rmdir()
        kept.rename(disk)
