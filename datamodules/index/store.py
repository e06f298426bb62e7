"""Reads the bytes of a shard set from a local directory, or from any URL that fsspec opens.

A store reads ranges of named files into the caller's buffers; it does not know records.

Local files are read with `preadv`, not mapped: if a file is truncated during a run, the read fails with an error that
names the file, not with SIGBUS. Remote files cost one request per range; temporary errors (a lost connection, a busy
server) are retried on a fixed schedule.

A store may be pickled and forked: reads do not use a file position that processes would share, and each process makes
its own fsspec event loop, since a loop does not survive a fork.
"""

import os
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, Protocol, TypeVar

import fsspec
import fsspec.asyn

from megabase.datamodules.errors import DataError

T = TypeVar("T")
Buffer = memoryview | bytearray

RETRY_DELAYS_S = (0.1, 1.0, 3.0, 10.0)
"""Waits between the attempts of a remote read, in seconds: one attempt more than waits."""

TIMEOUT_S = 60.0
"""Longest time of one remote request, in seconds."""

_OPENERS = 32
_inherited: list[Any] = []  # file systems of the parent process: closing one here would disturb the parent
_BUSY = (408, 425, 429)
_MAKE = "make shards with `megabase prepare INPUT... OUTPUT`"
_NO_RANGES = (
    "the server sends whole files only, and reading a window would fetch all of the shard each time: copy the "
    "shards to a disk, or use a server with range requests"
)
_PACKAGES = {
    "s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "http": "aiohttp", "https": "aiohttp",
    "az": "adlfs", "abfs": "adlfs", "hf": "huggingface_hub", "sftp": "paramiko", "ssh": "paramiko",
}  # fmt: skip


class StoreError(Exception):
    """Bytes cannot be read. The message gives the reason, not the file."""


class Store(Protocol):
    """Named files in one place, `root`, of which ranges of bytes are read."""

    @property
    def root(self) -> Path | str: ...

    def name_of(self, name: str) -> str:
        """Path or URL of a file, for messages."""

    def check(self, sizes: Mapping[str, int]) -> None:
        """Raise DataError unless every file exists, has its size in bytes, and can be read by range."""

    def read_whole(self, name: str) -> bytes:
        """The content of a file. Raises FileNotFoundError if it does not exist, StoreError if it cannot be read."""

    def read_into(self, name: str, offset: int, parts: Sequence[Buffer]) -> None:
        """Fill `parts`, one after another, with the bytes of a file from `offset` on.

        Raises StoreError if they cannot be read or the file ends before.
        """


def open_store(directory: str | Path) -> Store:
    """The files in a local directory, or under a URL (http://, s3://, gs://, memory://, file://...).

    Credentials, endpoint and anonymous access come from the environment variables and files of the protocol's package,
    and from those of fsspec, for example FSSPEC_S3_ANON=true.

    Raises:
        DataError: the directory does not exist; the protocol is unknown, or its package is not installed.
    """
    if "://" not in str(directory):
        return LocalStore(Path(directory))
    protocol, _, path = str(directory).partition("://")
    return LocalStore(Path(path)) if protocol in ("file", "local") else RemoteStore(str(directory))


class LocalStore:
    """Files in a directory, opened at the first read and kept open while the process may have more files."""

    def __init__(self, directory: Path) -> None:
        self.root = directory
        self._open: dict[str, _Descriptor] = {}
        if not directory.is_dir():
            problem = "is a file, not a directory of shards" if directory.exists() else "no such directory"
            raise DataError(f"{directory}: {problem}: {_MAKE}")

    def name_of(self, name: str) -> str:
        return str(self.root / name)

    def check(self, sizes: Mapping[str, int]) -> None:
        for name, size in sizes.items():
            path = self.root / name
            try:
                found = path.stat().st_size
            except OSError:
                raise _missing(path) from None
            _check_size(path, found, size)

    def read_whole(self, name: str) -> bytes:
        try:
            return (self.root / name).read_bytes()
        except FileNotFoundError:
            raise
        except OSError as error:
            raise StoreError(f"cannot be read ({error.strerror}): check its permissions") from error

    def read_into(self, name: str, offset: int, parts: Sequence[Buffer]) -> None:
        wanted = sum(map(len, parts))
        try:
            file = self._open.get(name) or self._descriptor(name)
            done = os.preadv(file.number, parts, offset)
            while done < wanted:  # a system call moves at most 2 GiB, and less when a signal comes
                more = os.preadv(file.number, _after(parts, done), offset + done)
                if not more:
                    raise StoreError(
                        f"ends at byte {offset + done}, and byte {offset + wanted - 1} is needed: copy the "
                        "shard again"
                    )
                done += more
        except OSError as error:
            raise StoreError(f"cannot be read ({error.strerror}): copy the shard again") from error

    def _descriptor(self, name: str) -> "_Descriptor":
        while len(self._open) >= _most_open():
            self._open.pop(next(iter(self._open)), None)
        return self._open.setdefault(name, _Descriptor(self.root / name))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}


class _Descriptor:
    """An open file, closed when no thread refers to it any more."""

    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


@cache
def _most_open() -> int:
    """Files that a store keeps open: half of the process's limit."""
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(allowed // 2, 1) if allowed != resource.RLIM_INFINITY else 4096


class RemoteStore:
    """Files under a URL, read by range through fsspec."""

    def __init__(self, url: str) -> None:
        self.root = url.rstrip("/")
        self._made: tuple[int, Any] | None = None
        self._filesystem()

    def name_of(self, name: str) -> str:
        return f"{self.root}/{name}"

    def check(self, sizes: Mapping[str, int]) -> None:
        with ThreadPoolExecutor(_OPENERS) as threads:
            for name, found in zip(sizes, threads.map(self._size, sizes), strict=True):
                _check_size(self.name_of(name), found, sizes[name])

    def read_whole(self, name: str) -> bytes:
        return self._retried(lambda: self._cat(name, None, None))

    def read_into(self, name: str, offset: int, parts: Sequence[Buffer]) -> None:
        wanted = sum(map(len, parts))
        try:
            found = memoryview(self._retried(lambda: self._range(name, offset, wanted)))
        except FileNotFoundError:
            raise StoreError("does not exist any more: copy the shard again") from None
        for part in parts:
            part[:], found = found[: len(part)], found[len(part) :]

    def _range(self, name: str, offset: int, wanted: int) -> bytes:
        found = self._cat(name, offset, offset + wanted)
        if len(found) > wanted:
            raise StoreError(_NO_RANGES)
        if len(found) < wanted:
            raise EOFError(f"{len(found)} bytes received, {wanted} requested from byte {offset} on")
        return found

    def _cat(self, name: str, start: int | None, end: int | None) -> bytes:
        filesystem = self._filesystem()
        limit = {"timeout": TIMEOUT_S} if filesystem.async_impl else {}
        found: bytes = filesystem.cat_file(self.name_of(name), start=start, end=end, **limit)
        return found

    def _size(self, name: str) -> int:
        """Bytes of a file. Raises DataError if it does not exist or cannot be read by range."""
        try:
            return self._retried(lambda: self._requested_size(name))
        except FileNotFoundError:
            raise _missing(self.name_of(name)) from None
        except StoreError as error:
            raise DataError(f"{self.name_of(name)}: {error}") from error

    def _requested_size(self, name: str) -> int:
        filesystem, url = self._filesystem(), self.name_of(name)
        if self.root.startswith(("http://", "https://")):
            return int(fsspec.asyn.sync(filesystem.loop, _http_size, filesystem, url, timeout=TIMEOUT_S))
        return int(filesystem.info(url)["size"])

    def _retried(self, action: Callable[[], T]) -> T:
        """The action's result; temporary errors are retried. Raises FileNotFoundError or StoreError."""
        for delay in (*RETRY_DELAYS_S, None):
            try:
                return action()
            except StoreError:
                raise
            except Exception as error:  # every file system has its own exceptions
                if _is_missing(error):
                    raise FileNotFoundError(str(error)) from error
                if (refusal := _refusal(error)) is not None:
                    raise StoreError(refusal) from error
                if delay is None:
                    tries = len(RETRY_DELAYS_S) + 1
                    raise StoreError(
                        f"cannot be read in {tries} attempts ({_line(error)}): check the network"
                    ) from error
            time.sleep(delay)
        raise AssertionError("the last try returns or raises")

    def _filesystem(self) -> Any:
        """The file system of this process: one made before a fork would wait for a thread that no longer exists."""
        if self._made is None or self._made[0] != os.getpid():
            if self._made is not None:
                _inherited.append(self._made)
                fsspec.asyn.reset_lock()
            self._made = os.getpid(), _make_filesystem(self.root)
        return self._made[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_made": None}


def _make_filesystem(url: str) -> Any:
    protocol = url.partition("://")[0]
    try:
        return fsspec.core.url_to_fs(url, skip_instance_cache=True)[0]
    except ImportError as error:
        package = _PACKAGES.get(protocol)
        way = f"`pip install {package}`" if package else str(error)
        raise DataError(
            f"{url}: reading {protocol}:// needs a package that is not installed: {way}"
        ) from error
    except ValueError as error:
        raise DataError(
            f"{url}: {error}: give a directory, or a URL such as s3://, gs:// or https://"
        ) from error


async def _http_size(filesystem: Any, url: str) -> int:
    """Bytes of a file on a web server, from a request for one byte, which shows whether it serves ranges."""
    session = await filesystem.set_session()
    headers = {"Range": "bytes=0-0", "Accept-Encoding": "identity"}
    async with session.get(filesystem.encode_url(url), headers=headers) as response:
        response.raise_for_status()
        if response.status != 206:
            raise StoreError(_NO_RANGES)
        return int(response.headers["Content-Range"].rpartition("/")[2])


def _check_size(name: str | Path, found: int, wanted: int) -> None:
    if found != wanted:
        raise DataError(f"{name}: {found} bytes, the index says {wanted}: copy or prepare the shards again")


def _missing(name: str | Path) -> DataError:
    return DataError(
        f"{name}: the index names this shard but it does not exist: copy the whole directory again"
    )


def _after(parts: Sequence[Buffer], done: int) -> list[memoryview]:
    """`parts` without their first `done` bytes."""
    rest = []
    for part in parts:
        rest.append(memoryview(part)[done:])
        done = max(done - len(part), 0)
    return rest


def _status(error: Exception) -> int | None:
    """The HTTP status of an exception itself. Not of its cause: aiohttp raises a cut connection from a "400"."""
    status = getattr(error, "status", None) or getattr(error, "code", None)
    return status if isinstance(status, int) else None


def _is_missing(error: Exception) -> bool:
    return _status(error) == 404 or (_status(error) is None and isinstance(error, FileNotFoundError))


def _refusal(error: Exception) -> str | None:
    """The message for an error that a retry would not change; None for a temporary one."""
    status = _status(error)
    if status == 416:
        return "ends before the bytes that are needed: copy the shard again"
    if isinstance(error, PermissionError) or (status and 400 <= status < 500 and status not in _BUSY):
        return f"refused ({_line(error)}): check the URL and your credentials"
    return None


def _line(error: Exception) -> str:
    """An exception as one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if _status(error) is None else f"HTTP {_status(error)}: {text}"
