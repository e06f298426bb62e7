"""A checkpoint's files compared with its manifest."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from megabase.pipeline.checkpoint.damage import checksum, find_damage, find_obvious_damage
from megabase.pipeline.checkpoint.manifest import MANIFEST, read_manifest
from tests.pipeline.checkpoints import sealed, write_checkpoint

OPTIMIZER = "checkpoint/zero_pp_rank_0_mp_rank_00_optim_states.pt"


@pytest.fixture
def intact(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "step-4")


def change(path: Path, **fields: object) -> None:
    """Set fields of a manifest."""
    manifest = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(sealed(manifest | fields))


def test_an_intact_checkpoint_has_no_damage(intact: Path) -> None:
    assert find_obvious_damage(intact) is None and find_damage(intact) is None
    assert read_manifest(intact).size == 10 + 768 + 1024


def test_a_manifest_without_files_is_damage(intact: Path) -> None:
    change(intact, files={})
    assert find_obvious_damage(intact) == find_damage(intact) == f"{MANIFEST} names no files"


def link_out(path: Path) -> None:
    outside = path.parent / "outside.pt"
    (path / OPTIMIZER).rename(outside)
    (path / OPTIMIZER).symlink_to(outside)


def link_folder_out(path: Path) -> None:
    (path / "checkpoint").rename(path.parent / "elsewhere")
    (path / "checkpoint").symlink_to(path.parent / "elsewhere")


def link_to_itself(path: Path) -> None:
    (path / OPTIMIZER).unlink()
    (path / OPTIMIZER).symlink_to(path / OPTIMIZER)


def make_folder(path: Path) -> None:
    (path / OPTIMIZER).unlink()
    (path / OPTIMIZER).mkdir()


def make_pipe(path: Path) -> None:
    (path / OPTIMIZER).unlink()
    os.mkfifo(path / OPTIMIZER)


def add_shard(path: Path) -> None:
    (path / "checkpoint" / "zero_pp_rank_1_mp_rank_00_optim_states.pt").write_bytes(b"x")


def add_universal(path: Path) -> None:
    (path / "latest_universal").write_text("checkpoint")


def point(target: str) -> Callable[[Path], None]:
    def do(path: Path) -> None:
        (path / "latest").write_text(target)
        files = json.loads((path / MANIFEST).read_text())["files"]
        files["latest"] = {"size": len(target), "sha256": checksum(path / "latest")}
        change(path, files=files)

    return do


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (link_out, "optim_states.pt is a link that leads out of the checkpoint, to "),
        (link_folder_out, "is a link that leads out of the checkpoint, to "),
        (link_to_itself, "optim_states.pt is a link to itself"),
        (make_folder, "optim_states.pt is not a file"),
        (make_pipe, "optim_states.pt is not a file"),
        (add_shard, "zero_pp_rank_1_mp_rank_00_optim_states.pt exists, but megabase.json does not name it"),
        (add_universal, "latest_universal exists, but"),
        (point("../other"), "latest points to '../other', which is no folder of the checkpoint"),
        (point("elsewhere"), "latest points to 'elsewhere'"),
        (point(""), "latest points to ''"),
    ],
)
def test_files_that_deepspeed_would_read_by_mistake_are_damage(
    intact: Path, harm: Callable[[Path], None], message: str
) -> None:
    harm(intact)
    for found in (find_obvious_damage(intact), find_damage(intact)):
        assert found is not None and message in found


def test_other_files_are_no_damage(intact: Path) -> None:
    for stray in (".nfs000000012", "notes.txt", "latest~", "checkpoint/.optim.pt.swp", ".latest.swp"):
        (intact / stray).write_text("x")
    assert find_damage(intact) is None


def test_links_to_the_checkpoint_and_within_it_are_no_damage(intact: Path, tmp_path: Path) -> None:
    """Users move a checkpoint to another disk and leave a link."""
    moved = intact.rename(tmp_path / "moved")
    (moved / OPTIMIZER).rename(moved / "data")
    (moved / OPTIMIZER).symlink_to(moved / "data")
    intact.symlink_to(moved)
    assert find_damage(intact) is None


def test_a_file_in_place_of_the_directory_is_damage(tmp_path: Path) -> None:
    (tmp_path / "step-4").write_text("x")
    assert "megabase.json is not a file in a directory" in str(find_damage(tmp_path / "step-4"))


def test_ranks_share_the_reading_and_report_it(intact: Path) -> None:
    data = bytearray((intact / OPTIMIZER).read_bytes())
    data[7] ^= 1
    (intact / OPTIMIZER).write_bytes(data)
    assert find_obvious_damage(intact) is None
    assert [find_damage(intact, rank=rank, size=3) is None for rank in range(3)] == [False, True, True]
    read: list[int] = []
    assert (
        find_damage(intact, report=read.append)
        == f"{OPTIMIZER} has another checksum than when it was written"
    )
    assert sum(read) == 1024
