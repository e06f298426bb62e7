"""Disk space for a checkpoint."""

import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

from megabase.pipeline.checkpoint import space
from megabase.pipeline.checkpoint.manifest import MANIFEST, read_manifest
from megabase.pipeline.checkpoint.space import needed_bytes, shortage
from tests.pipeline.checkpoints import write_checkpoint


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_the_needed_space_follows_from_the_last_checkpoint_or_from_the_model(tmp_path: Path) -> None:
    parameters = 10_000_000
    sizes = {
        (stage, precision): needed_bytes(parameters, stage, precision) - space._SPARE_BYTES
        for stage in (0, 2, 3)
        for precision in ("32", "bf16")
    }
    # fp32 master weights and two moments; below stage 3 the model's own weights as well.
    assert sizes[2, "32"] >= 16 * parameters > sizes[2, "bf16"] >= 14 * parameters
    assert 14 * parameters > sizes[3, "bf16"] == sizes[3, "32"] >= 12 * parameters
    before = read_manifest(write_checkpoint(tmp_path / "step-4"))
    assert before.size < needed_bytes(parameters, 2, "32", before) - space._SPARE_BYTES < 1.1 * before.size
    # If its stage or precision differs, its size is not used.
    assert needed_bytes(parameters, 3, "32", before) == needed_bytes(parameters, 3, "32")


def test_a_shortage_names_sizes_the_directory_and_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**12, 10**12 - 5_000_000, 5_000_000))
    assert shortage(tmp_path, 5_000_000) is None
    message = shortage(tmp_path, 5_000_001)
    assert (
        message
        and f"needs up to 4.8 MiB, {tmp_path} has 4.8 MiB free" in message
        and "checkpoint.keep" in message
    )
    assert "broken" not in message
    write_checkpoint(tmp_path / "step-4", name="step-4.broken")
    assert "broken checkpoints, which are never deleted automatically, take 2." in str(
        shortage(tmp_path, 5_000_001)
    )


def test_the_last_checkpoint_is_the_estimate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = 8 << 20
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**12, 10**12 - free, free))
    assert "a checkpoint needs up to 19.6 MiB" in str(space.describe_shortage(tmp_path, 1_000_000, 2, "32"))
    path = write_checkpoint(tmp_path / "step-4")
    assert space.describe_shortage(tmp_path, 1_000_000, 2, "32") is None
    (path / MANIFEST).unlink()
    assert space.describe_shortage(tmp_path, 1_000_000, 2, "32")


def test_a_file_system_that_does_not_answer_raises_nothing(tmp_path: Path) -> None:
    message = space.describe_shortage(tmp_path / "gone", 1_000_000, 2, "32")
    assert message and "is unknown: " in message
