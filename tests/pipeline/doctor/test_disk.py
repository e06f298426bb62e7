"""The disk of the runs: as it is here, and broken one by one."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from megabase.datamodules.files import FileLock
from megabase.pipeline.doctor import disk
from megabase.pipeline.doctor.disk import check_disk
from megabase.pipeline.doctor.finding import NOTE, OK, WRONG, Finding


def checked(root: Path, now: Callable[[], float] = time.time) -> dict[str, str]:
    """States by text, of a small measurement."""
    return {finding.text: finding.state for finding in check_disk(root, now=now, written=1 << 20)}


def state_of(found: dict[str, str], text: str) -> str:
    return next(state for each, state in found.items() if text in each)


def test_a_good_disk(tmp_path: Path) -> None:
    found = checked(tmp_path / "runs" / "new")
    assert state_of(found, "free") in (OK, WRONG)  # of this machine
    assert state_of(found, "of the file server's") == OK
    assert any("per second, fsync included" in text for text in found)
    assert not any("locks" in text for text in found)
    assert list(tmp_path.iterdir()) == []  # nothing is left, and nothing made


def test_a_file_in_place_of_the_directory(tmp_path: Path) -> None:
    assert checked(tmp_path)
    (tmp_path / "file").touch()
    assert checked(tmp_path / "file" / "runs")  # the nearest directory is checked


@pytest.mark.parametrize(
    ("broken", "state", "text"),
    [
        ("space", WRONG, "1.0 GiB of 2.0 GiB free"),
        ("locks", NOTE, "it has no file locks"),
        ("speed", NOTE, "per second, fsync included"),
        ("clock", WRONG, "the file server is +100 s from this machine's clock"),
        ("write", WRONG, "cannot be written: No space left on device"),
        ("rename", WRONG, "a rename does not replace a file at once"),
    ],
)
def test_each_thing_broken(
    broken: str, state: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time
    if broken == "space":
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 30, total=2 << 30))
    elif broken == "locks":
        monkeypatch.setattr(FileLock, "take", lambda path: SimpleNamespace(close=lambda: None))
    elif broken == "speed":
        monkeypatch.setattr(disk, "SLOW", 1 << 60)
    elif broken == "clock":
        now = lambda: time.time() - 100  # noqa: E731
    elif broken == "write":

        def full(*_: object) -> Finding:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(disk, "_speed", full)
    else:
        monkeypatch.setattr(Path, "rename", lambda self, target: target)
    assert state_of(checked(tmp_path, now), text) == state
    assert not list(tmp_path.glob(".megabase-doctor-*"))
