"""The file system of the runs: whether it keeps what a training relies on, its speed, its space and its clock."""

from __future__ import annotations

import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megabase.datamodules.files import FileLock, LockHeldError
from megabase.pipeline.doctor.finding import Finding, note, ok, wrong
from megabase.pipeline.readable import readable_size

WRITTEN = 128 << 20
"""Bytes that are written to measure the speed."""
SLOW = 50 << 20
"""Bytes per second below which a checkpoint takes noticeably long."""
LEAST_FREE = 10 << 30
MOST_SKEW_S = 5.0
"""Seconds by which two clocks may differ: `megabase status` compares times that several machines wrote."""


@contextmanager
def scratch(root: Path) -> Iterator[Path]:
    """A new directory in `root`, or in the nearest directory above it that exists; removed afterwards."""
    parent = next(path for path in (root, *root.parents) if path.is_dir())
    directory = parent / f".megabase-doctor-{uuid.uuid4().hex}"
    directory.mkdir()
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def check_disk(root: Path, *, now: Callable[[], float] = time.time, written: int = WRITTEN) -> list[Finding]:
    """Check the directory of all runs.

    Args:
        root: `run.root`; it need not exist.
        now: this machine's clock, seconds.
        written: bytes to write.
    """
    what = f"disk of {root}"
    way_out = "set run.root to a directory that this account may write"
    try:
        with scratch(root) as directory:
            return [
                *_behaviour(what, directory),
                _speed(what, directory, written),
                _space(what, directory),
                check_clock("clock", directory, now),
            ]
    except OSError as error:
        return [wrong(what, f"cannot be written: {error.strerror or error}", way_out)]


def _behaviour(what: str, directory: Path) -> list[Finding]:
    """A rename replaces a file, and a lock keeps a second holder out."""
    one, other = directory / "one", directory / "other"
    one.write_text("new")
    other.write_text("old")
    one.rename(other)
    if one.exists() or other.read_text() != "new":
        return [
            wrong(what, "a rename does not replace a file at once", "use a POSIX file system for run.root")
        ]
    lock = FileLock.take(directory / "lock")
    try:
        FileLock.take(directory / "lock").close()
    except LockHeldError:
        return []
    finally:
        lock.close()
    return [
        note(
            what,
            "it has no file locks: nothing keeps two jobs out of one run directory",
            "mount it with locks (Lustre: -o flock), or never start a run twice",
        )
    ]


def _speed(what: str, directory: Path, written: int) -> Finding:
    block = os.urandom(1 << 20)
    start = time.monotonic()
    with (directory / "speed").open("wb") as file:
        for _ in range(written >> 20):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    rate = written / max(time.monotonic() - start, 1e-9)
    text = f"writes {readable_size(round(rate))} per second, fsync included"
    if rate < SLOW:
        return note(what, text, "checkpoint.background=true hides it; a parallel file system is faster")
    return ok(what, text)


def _space(what: str, directory: Path) -> Finding:
    usage = shutil.disk_usage(directory)
    text = f"{readable_size(usage.free)} of {readable_size(usage.total)} free"
    if usage.free < LEAST_FREE:
        return wrong(what, text, "free space, or set run.root to another disk")
    return ok(what, text)


def check_clock(what: str, directory: Path, now: Callable[[], float] = time.time) -> Finding:
    """Compare this machine's clock with that of the file server, which sets the times of files."""
    before = now()
    probe = directory / "clock"
    probe.touch()
    skew = probe.stat().st_mtime - before
    if abs(skew) > MOST_SKEW_S:
        text = f"the file server is {skew:+.0f} s from this machine's clock"
        return wrong(what, text, "synchronise the clocks: chronyc makestep")
    return ok(what, f"within {MOST_SKEW_S:.0f} s of the file server's")
