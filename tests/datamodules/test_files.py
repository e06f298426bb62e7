import errno
import fcntl
import json
import multiprocessing
import os
import platform
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from megabase.datamodules.files import FileLock, LockHeldError, publish, publish_json


def test_published_content_replaces_the_old_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    publish(path, b"old")
    publish_json(path, {"step": 3})
    assert json.loads(path.read_bytes()) == {"step": 3}
    assert list(tmp_path.iterdir()) == [path]


def test_failed_publish_keeps_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "status.json"
    publish(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        publish(path, b"new")
    assert path.read_bytes() == b"old"


def test_lock_is_exclusive_names_its_holder_and_is_free_after_close(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    with FileLock.take(path) as lock:
        assert lock.supported
        with pytest.raises(LockHeldError) as held:
            FileLock.take(path)
        assert held.value.holder == f"{platform.node()} process {os.getpid()}" == path.read_text().strip()
        assert held.value.holder_is_running()
    FileLock.take(path).close()


@pytest.mark.parametrize("holder", ["", "another-host process 1", f"{platform.node()} process 999999999"])
def test_holder_that_is_unknown_elsewhere_or_gone_does_not_run_here(holder: str) -> None:
    assert not LockHeldError(Path(".lock"), holder).holder_is_running()


def test_lock_of_a_replaced_file_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    with FileLock.take(path) as lock:
        assert lock.is_file(path)
        path.unlink()
        assert not lock.is_file(path)
        path.touch()
        assert not lock.is_file(path)


def test_file_system_without_locks_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with FileLock.take(tmp_path / ".lock") as lock:
        assert not lock.supported


def test_other_errors_of_locking_are_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(descriptor: int, operation: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", broken)
    with pytest.raises(OSError, match="Input/output"):
        FileLock.take(tmp_path / ".lock")


def test_worker_holds_the_lock_that_it_was_sent(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    lock = FileLock.take(path)
    worker = context.Process(target=_hold, args=(theirs, lock), daemon=True)
    worker.start()
    theirs.close()
    assert ours.recv() == "received"
    lock.close()
    with pytest.raises(LockHeldError):
        FileLock.take(path)
    ours.close()
    worker.join()
    FileLock.take(path).close()


def _hold(connection: Connection, lock: FileLock) -> None:
    connection.send("received")
    connection.poll(None)  # until the parent closes its end
