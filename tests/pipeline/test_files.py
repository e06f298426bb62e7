"""Sizes, and errors of a full disk."""

import errno
from pathlib import Path

import pytest
import torch

from megabase.pipeline.files import directory_size, is_disk_full, readable_size, readable_time


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


def test_sizes_for_people() -> None:
    assert [readable_size(size) for size in (0, 1023, 1024, 3 * 2**29, 5 * 2**40)] == [
        "0 bytes",
        "1023 bytes",
        "1.0 KiB",
        "1.5 GiB",
        "5.0 TiB",
    ]


def test_the_size_of_a_directory_counts_all_below(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "x").write_bytes(bytes(10))
    (tmp_path / "a" / "b" / "y").write_bytes(bytes(7))
    assert directory_size(tmp_path) == 17


def test_times_for_people() -> None:
    seconds = [0.123, 5.4, 42.2, 89, 5400, 86_400 * 12.4, 86_400 * 365 * 12_345]
    assert [readable_time(each) for each in seconds] == [
        *("0.12 s", "5.4 s", "42 s", "89 s"),
        *("1.5 hours", "12 days", "12,345 years"),
    ]
