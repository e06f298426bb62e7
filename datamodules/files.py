"""Files that are complete or absent, and locks between processes.

A published file is written under another name, synced to disk and renamed, so a reader never sees part of it. A lock is
`flock(2)` on a file: the kernel releases it when the last process that holds it ends, however it ends.
"""

import errno
import fcntl
import json
import os
import platform
from collections.abc import Callable
from multiprocessing import reduction
from pathlib import Path
from types import TracebackType
from typing import Any

_HOLDER_BYTES = 200
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)


def publish(path: Path, content: bytes) -> None:
    """Write a file by rename: afterwards it is on disk with all of `content`; after a crash it is old or new.

    Raises:
        OSError: the file cannot be written.
    """
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(content)
    sync(partial)
    partial.rename(path)
    sync(path.parent)


def publish_json(path: Path, value: Any, indent: int | None = None) -> None:
    """Write one JSON value as `publish` does."""
    publish(path, f"{json.dumps(value, indent=indent)}\n".encode())


def sync(path: Path) -> None:
    """Wait until a file's content, or a directory's entries, are on disk.

    Raises:
        OSError: the path cannot be opened or synced.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class LockHeldError(BlockingIOError):
    """Another process holds the lock.

    Attributes:
        holder: the line in the lock file, "HOST process PID"; empty if the holder has not written it yet.
    """

    def __init__(self, path: Path, holder: str) -> None:
        super().__init__(errno.EWOULDBLOCK, f"locked by {holder or 'another process'}", str(path))
        self.holder = holder

    def holder_is_running(self) -> bool:
        """Whether the holder is a process of this host that still runs.

        False for a holder on another host, which cannot be checked from here.
        """
        host, _, process = self.holder.partition(" process ")
        return host == platform.node() and process.isdigit() and Path(f"/proc/{process}").exists()


class FileLock:
    """An exclusive advisory lock on a file, held until `close` or the end of the process.

    Sent to a worker of `multiprocessing`, the worker holds the same lock: it is released when the last of these
    processes has ended. A context manager.

    Attributes:
        supported: False on a file system without locks, where nothing keeps another process out.
    """

    def __init__(self, descriptor: int, supported: bool = True) -> None:
        self._descriptor = descriptor
        self.supported = supported

    @classmethod
    def take(cls, path: Path, mode: int = 0o644) -> "FileLock":
        """Lock `path` without waiting, and write this host and process into it. The file is made if missing.

        Args:
            path: the lock file.
            mode: permissions of a new file, before the umask.

        Raises:
            LockHeldError: another process holds it.
            OSError: the file cannot be made, locked or written.
        """
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, mode)
        try:
            supported = _flock(descriptor)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{platform.node()} process {os.getpid()}\n".encode(), 0)
        except BlockingIOError:
            holder = os.pread(descriptor, _HOLDER_BYTES, 0).decode(errors="replace").strip()
            os.close(descriptor)
            raise LockHeldError(path, holder) from None
        except BaseException:
            os.close(descriptor)
            raise
        return cls(descriptor, supported)

    def is_file(self, path: Path) -> bool:
        """Whether `path` still names the locked file; False if it was removed or replaced."""
        try:
            return os.path.samestat(os.fstat(self._descriptor), path.stat())
        except FileNotFoundError:
            return False

    def close(self) -> None:
        """Release this process's hold on the lock; a second call does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> "FileLock":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> tuple[Callable[..., "FileLock"], tuple[Any, bool]]:
        return _in_worker, (reduction.DupFd(self._descriptor), self.supported)


def _in_worker(descriptor: Any, supported: bool) -> FileLock:
    """The lock in a process that it was sent to."""
    return FileLock(descriptor.detach(), supported)


def _flock(descriptor: int) -> bool:
    """Take the lock, or raise BlockingIOError; returns False if the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return False
        raise
    return True
