"""A checkpoint's files: hashed while written, copied before training continues, and loaded without executing code."""

import errno
import hashlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from megabase.pipeline.errors import RunError
from megabase.pipeline.zero.checkpoint_engine import Storage, Written, finite, load


def states() -> dict[str, Any]:
    """What DeepSpeed saves, in small: tensors that share a storage, of several types, and small values."""
    flat = torch.arange(1000.0)
    views = {"a": flat[:600].view(20, 30), "b": flat[600:]}
    other = {"half": torch.ones(7, dtype=torch.bfloat16), "empty": torch.empty(0), "step": torch.tensor(3.0)}
    return {"module": views, "optimizer": [other, (1, 2.5)], "steps": 3, "size": torch.Size([2, 3])}


def write(storage: Storage, path: Path, content: Any) -> Written:
    storage.create(None)  # type: ignore[arg-type]
    storage.save(content, str(path))
    return storage.result()


@pytest.mark.parametrize("background", [False, True])
def test_saved_files_are_hashed_and_read_back(tmp_path: Path, background: bool) -> None:
    storage = Storage(background)
    for _ in range(2):  # the second time into the same buffers
        written = write(storage, tmp_path / "file.pt", states())
        content = (tmp_path / "file.pt").read_bytes()
        assert written.error is None
        assert written.files == {
            tmp_path / "file.pt": {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        }
    for mmap in (False, True):
        back = load(tmp_path / "file.pt", mmap=mmap)
        torch.testing.assert_close(back, states(), rtol=0, atol=0)
    # 1,000 numbers that several tensors share are written once.
    assert len(content) < 4000 + 3000


def test_training_may_change_states_that_are_being_written(tmp_path: Path) -> None:
    storage, content = Storage(background=True), states()
    storage.create(None)  # type: ignore[arg-type]
    storage.save(content, str(tmp_path / "file.pt"))
    content["module"]["a"].fill_(-1.0)
    content["optimizer"].clear()
    assert storage.result().error is None
    torch.testing.assert_close(load(tmp_path / "file.pt"), states(), rtol=0, atol=0)


@pytest.mark.parametrize("background", [False, True])
def test_an_error_is_returned_once_by_result(tmp_path: Path, background: bool) -> None:
    storage = Storage(background)
    full = write(storage, Path("/dev/full"), states())
    assert isinstance(full.error, OSError) and full.error.errno == errno.ENOSPC and not full.files
    (tmp_path / "no_directory").touch()
    storage.makedirs(str(tmp_path / "no_directory" / "checkpoint"))
    assert isinstance(storage.result().error, OSError)
    assert write(storage, tmp_path / "file.pt", states()).error is None


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_file_with_a_number_that_is_not_finite_is_not_written(
    tmp_path: Path, bad: float, background: bool
) -> None:
    storage = Storage(background)
    assert finite(states())
    for place in (("module", "a"), ("module", "b"), ("optimizer", 0, "half")):
        content = spoiled = states()
        for key in place:
            spoiled = spoiled[key]
        spoiled.view(-1)[-1] = bad
        assert not finite(content)
        written = write(storage, tmp_path / "file.pt", content)
        assert str(written.error) == "weights or optimizer states are not finite"
        assert not written.files and not (tmp_path / "file.pt").exists()
    assert write(storage, tmp_path / "file.pt", states()).error is None


class Bomb:
    """Runs code when it is unpickled."""

    def __init__(self, fuse: Path) -> None:
        self.fuse = fuse

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.fuse,)


def test_code_in_a_file_is_refused_and_not_executed(tmp_path: Path) -> None:
    torch.save({"weights": torch.ones(3), "bomb": Bomb(tmp_path / "fuse")}, tmp_path / "file.pt")
    for mmap in (False, True):
        with pytest.raises(RunError, match=r"file\.pt holds more than weights"):
            load(tmp_path / "file.pt", mmap=mmap)
    assert not (tmp_path / "fuse").exists()


def test_an_incomplete_file_is_named(tmp_path: Path) -> None:
    torch.save(states(), tmp_path / "file.pt")
    content = (tmp_path / "file.pt").read_bytes()
    for size in (0, 10, len(content) // 2):
        (tmp_path / "file.pt").write_bytes(content[:size])
        with pytest.raises(RunError, match=r"file\.pt"):
            load(tmp_path / "file.pt")
