"""Sizes of directories, errors of a full disk, and small files of JSON."""

import errno
from pathlib import Path

import pytest
import torch

from megabase.pipeline.files import directory_size, is_disk_full, read_object


@pytest.mark.parametrize("numbers", [10, 5_000_000])
def test_a_full_disk_is_found_among_the_causes_of_torch_s_own_error(numbers: int) -> None:
    with (
        pytest.raises((OSError, RuntimeError)) as raised,
        Path("/dev/full").open("wb") as full,
    ):
        torch.save({"x": torch.zeros(numbers)}, full)
    assert is_disk_full(raised.value)


def test_a_full_disk_differs_from_other_errors() -> None:
    assert is_disk_full(OSError(errno.EDQUOT, "Disk quota exceeded"))
    assert not is_disk_full(OSError(errno.EIO, "Input/output error"))
    assert not is_disk_full(RuntimeError("anything"))
    assert not is_disk_full(None)


def test_the_size_of_a_directory_counts_all_below(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "x").write_bytes(bytes(10))
    (tmp_path / "a" / "b" / "y").write_bytes(bytes(7))
    assert directory_size(tmp_path) == 17


def test_a_file_without_an_object_reads_as_an_empty_one(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    assert read_object(path) == read_object(tmp_path) == {}
    for content, expected in (
        (b'{"a": 1}', {"a": 1}),
        (b"[1]", {}),
        (b'{"a": 1', {}),
        (b"\xff", {}),
        (b"", {}),
    ):
        path.write_bytes(content)
        assert read_object(path) == expected
