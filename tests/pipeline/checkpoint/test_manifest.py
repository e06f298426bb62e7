"""A manifest is read with suspicion: whatever is in it, the answer is one clear line."""

import json
import os
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from megabase.pipeline.checkpoint.damage import checksum, find_damage, find_obvious_damage
from megabase.pipeline.checkpoint.manifest import (
    MANIFEST,
    Damaged,
    Manifest,
    read_manifest,
)
from megabase.pipeline.errors import UserError
from tests.pipeline.checkpoints import sealed, write_checkpoint

OPTIMIZER = "checkpoint/zero_pp_rank_0_mp_rank_00_optim_states.pt"
HASH = "0" * 64


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "step-4")


def change(path: Path, **fields: object) -> None:
    """Set fields of a manifest."""
    manifest = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(sealed(manifest | fields))


def name_file(path: Path, name: str, size: object = 0, sha256: object = HASH) -> None:
    """Add a file to a manifest."""
    files = json.loads((path / MANIFEST).read_text())["files"]
    change(path, files=files | {name: {"size": size, "sha256": sha256}})


def test_a_whole_one_is_whole(whole: Path) -> None:
    assert find_obvious_damage(whole) is None and find_damage(whole) is None
    assert read_manifest(whole).size == 10 + 768 + 1024


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../x", "a/../../x", "..", "checkpoint/..", "//etc/passwd", "/"]
)
def test_no_name_leads_out(whole: Path, name: str) -> None:
    name_file(whole, name)
    with pytest.raises(Damaged, match=r"megabase\.json names a file outside its directory: '"):
        read_manifest(whole)


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "./x",
        "a//x",
        "a/",
        "..\\x",
        "a\\..\\..\\x",
        "a\0b",
        "a\nb",
        "\ud800",
        "x" * 256,
        "é" * 128,
        "a/" * 2000 + "b",
        MANIFEST,
    ],
)
def test_odd_names_are_no_names(whole: Path, name: str) -> None:
    name_file(whole, name)
    with pytest.raises(Damaged, match="a file name that no checkpoint has"):
        read_manifest(whole)


@pytest.mark.parametrize("size", [-1, 2**63, 1.5, "12", None, True, [1]])
def test_impossible_sizes(whole: Path, size: object) -> None:
    name_file(whole, "x", size)
    with pytest.raises(Damaged, match="lacks size and checksum of x: "):
        read_manifest(whole)


@pytest.mark.parametrize("sha256", ["", "0" * 63, "G" * 64, "0" * 64 + "\n", None, 5])
def test_impossible_checksums(whole: Path, sha256: object) -> None:
    name_file(whole, "x", 0, sha256)
    with pytest.raises(Damaged, match="has no checksum of x: "):
        read_manifest(whole)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("step", -1, "step=-1"),
        ("step", 2**70, "step=1180591620717411303424"),
        ("step", True, "step=True"),
        ("step", "4", "step='4'"),
        ("step", 5, "is of step 5"),
        ("samples", None, "samples=None"),
        ("ranks", 0, "ranks=0"),
        ("stage", 4, "stage=4"),
        ("precision", 32, "precision=32"),
        ("config", [], r"config=\[\]"),
        ("versions", {"torch": 2}, r"versions=\{'torch': 2\}"),
        ("created", "now", "created='now'"),
        ("created", float("nan"), "created=nan"),
        ("created", float("inf"), "created=inf"),
        ("files", [], r"files=\[\]"),
        ("files", {"x": 5}, r"files=\{'x': 5\}"),
        ("files", {"x": {}}, "size and checksum of x"),
        ("files", {"x": {"size": 1, "sha256": HASH, "more": 1}}, "size and checksum of x"),
        ("unheard_of", 1, "a field that no manifest has: 'unheard_of'"),
        ("version", 1, "has no version that was ever released: 1"),
        ("version", 0, "has no version that was ever released: 0"),
        ("version", 1.0, r"has no version that was ever released: 1\.0"),
        ("version", None, "has no version that was ever released: None"),
    ],
)
def test_impossible_fields(whole: Path, field: str, value: object, says: str) -> None:
    change(whole, **{field: value})
    with pytest.raises(Damaged, match=says):
        read_manifest(whole)


def test_version_2_had_no_alphabet(whole: Path) -> None:
    content = json.loads((whole / MANIFEST).read_text())
    del content["alphabet"]
    (whole / MANIFEST).write_text(sealed(content | {"version": 2}))
    assert read_manifest(whole).alphabet is None
    change(whole, version=3, alphabet="dna")
    assert read_manifest(whole).alphabet == "dna"


def test_a_changed_manifest_is_noticed(whole: Path) -> None:
    content = json.loads((whole / MANIFEST).read_text())
    content["config"]["model.dim"] = 16
    (whole / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(Damaged, match="is not as it was written"):
        read_manifest(whole)


def test_a_manifest_without_files_is_damage(whole: Path) -> None:
    change(whole, files={})
    assert find_obvious_damage(whole) == find_damage(whole) == f"{MANIFEST} names no files"


def test_a_field_that_is_missing_is_named(whole: Path) -> None:
    content = json.loads((whole / MANIFEST).read_text())
    del content["ranks"]
    (whole / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(Damaged, match="lacks the field 'ranks'"):
        read_manifest(whole)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"", "cannot be read: "),
        (b"\xff\xfe\xfd", "cannot be read: "),
        (b"[1, 2]", r"cannot be read: \[1, 2\] instead of fields"),
        (b"[" * 100_000, "cannot be read: "),
        (b'{"version": ' + b"9" * 5000 + b"}", "cannot be read: "),
    ],
)
def test_what_is_no_manifest(whole: Path, text: bytes, says: str) -> None:
    (whole / MANIFEST).write_bytes(text)
    with pytest.raises(Damaged, match=says):
        read_manifest(whole)


def test_a_manifest_without_end_is_not_read_to_it(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megabase.pipeline.checkpoint.manifest.MAX_MANIFEST_BYTES", 100)
    with pytest.raises(Damaged, match="has more than 0 MiB"):
        read_manifest(whole)


def test_a_newer_one_is_no_damage(whole: Path) -> None:
    change(whole, version=99, unheard_of=1)
    with pytest.raises(UserError, match="update megabase"):
        find_obvious_damage(whole)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=8,
)
FIELDS = st.sampled_from([*(field.name for field in fields(Manifest)), "more"])
ENTRIES = st.dictionaries(
    st.text(max_size=12) | st.sampled_from(["latest", "../x", "/x", "a/b.pt"]),
    st.fixed_dictionaries({"size": st.integers(-1, 2**64) | JSON, "sha256": st.just(HASH) | JSON}) | JSON,
    max_size=3,
)


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("manifest") / "step-4")


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.dictionaries(FIELDS, JSON) | JSON, files=st.none() | ENTRIES, base=st.booleans())
@example(content={"version": float("inf")}, files=None, base=True)
@example(content={}, files={"a/b.pt": {"size": 0, "sha256": HASH}}, base=True)
def test_any_json_is_read_or_refused(bare: Path, content: Any, files: Any, base: bool) -> None:
    good = json.loads(GOOD)
    if isinstance(content, dict):
        content = (good if base else {}) | content
        if files is not None:
            content["files"] = files
    (bare / MANIFEST).write_text(sealed(content) if isinstance(content, dict) else json.dumps(content))
    for look in (read_manifest, find_obvious_damage, find_damage):
        try:
            look(bare)
        except Damaged as damaged:
            assert MANIFEST in str(damaged) and "\n" not in str(damaged)[:200]
        except UserError as error:
            assert "newer megabase" in str(error)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=60), st.integers(0, 600))
def test_any_bytes_are_read_or_refused(bare: Path, noise: bytes, at: int) -> None:
    (bare / MANIFEST).write_bytes(GOOD.encode()[:at] + noise + GOOD.encode()[at + len(noise) :])
    try:
        read_manifest(bare)
    except (Damaged, UserError) as error:
        assert str(error)


GOOD = sealed(
    {
        "step": 4,
        "samples": 32,
        "ranks": 2,
        "stage": 2,
        "precision": "32",
        "config": {"model.dim": 8},
        "data": "d",
        "versions": {"torch": "2"},
        "created": 1.5,
        "files": {},
        "version": 2,
    }
)


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
    ("harm", "says"),
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
def test_what_would_be_read_instead_is_damage(whole: Path, harm: Callable[[Path], None], says: str) -> None:
    harm(whole)
    for found in (find_obvious_damage(whole), find_damage(whole)):
        assert found is not None and says in found


def test_a_stray_file_is_none(whole: Path) -> None:
    for stray in (".nfs000000012", "notes.txt", "latest~", "checkpoint/.optim.pt.swp", ".latest.swp"):
        (whole / stray).write_text("x")
    assert find_damage(whole) is None


def test_a_link_to_the_whole_checkpoint_and_links_within_it_are_fine(whole: Path, tmp_path: Path) -> None:
    """Users move a checkpoint to another disk and leave a link."""
    moved = whole.rename(tmp_path / "moved")
    (moved / OPTIMIZER).rename(moved / "data")
    (moved / OPTIMIZER).symlink_to(moved / "data")
    whole.symlink_to(moved)
    assert find_damage(whole) is None


def test_a_file_in_place_of_the_directory_is_damage(tmp_path: Path) -> None:
    (tmp_path / "step-4").write_text("x")
    assert "megabase.json is no file in a directory" in str(find_damage(tmp_path / "step-4"))


def test_ranks_share_the_reading_and_report_it(whole: Path) -> None:
    data = bytearray((whole / OPTIMIZER).read_bytes())
    data[7] ^= 1
    (whole / OPTIMIZER).write_bytes(data)
    assert find_obvious_damage(whole) is None
    assert [find_damage(whole, rank=rank, size=3) is None for rank in range(3)] == [False, True, True]
    read: list[int] = []
    assert (
        find_damage(whole, report=read.append) == f"{OPTIMIZER} has another checksum than when it was written"
    )
    assert sum(read) == 1024
