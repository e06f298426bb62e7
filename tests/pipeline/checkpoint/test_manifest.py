"""Nothing in a manifest is trusted: whatever it holds, the error is one clear line."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from megabase.pipeline.checkpoint.damage import find_damage, find_obvious_damage
from megabase.pipeline.checkpoint.manifest import (
    MANIFEST,
    Damaged,
    Manifest,
    read_manifest,
)
from megabase.pipeline.errors import UserError
from tests.pipeline.checkpoints import sealed, write_checkpoint

HASH = "0" * 64


@pytest.fixture
def intact(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "step-4")


def change(path: Path, **fields: object) -> None:
    """Set fields of a manifest."""
    manifest = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(sealed(manifest | fields))


def name_file(path: Path, name: str, size: object = 0, sha256: object = HASH) -> None:
    """Add a file to a manifest."""
    files = json.loads((path / MANIFEST).read_text())["files"]
    change(path, files=files | {name: {"size": size, "sha256": sha256}})


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../x", "a/../../x", "..", "checkpoint/..", "//etc/passwd", "/"]
)
def test_no_file_name_leads_out_of_the_directory(intact: Path, name: str) -> None:
    name_file(intact, name)
    with pytest.raises(Damaged, match=r"megabase\.json names a file outside its directory: '"):
        read_manifest(intact)


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
def test_odd_file_names_are_refused(intact: Path, name: str) -> None:
    name_file(intact, name)
    with pytest.raises(Damaged, match="a file name that no checkpoint has"):
        read_manifest(intact)


@pytest.mark.parametrize("size", [-1, 2**63, 1.5, "12", None, True, [1]])
def test_impossible_sizes(intact: Path, size: object) -> None:
    name_file(intact, "x", size)
    with pytest.raises(Damaged, match="lacks size and checksum of x: "):
        read_manifest(intact)


@pytest.mark.parametrize("sha256", ["", "0" * 63, "G" * 64, "0" * 64 + "\n", None, 5])
def test_impossible_checksums(intact: Path, sha256: object) -> None:
    name_file(intact, "x", 0, sha256)
    with pytest.raises(Damaged, match="has no checksum of x: "):
        read_manifest(intact)


@pytest.mark.parametrize(
    ("field", "value", "message"),
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
        ("version", 1, "has no released version: 1"),
        ("version", 0, "has no released version: 0"),
        ("version", 1.0, r"has no released version: 1\.0"),
        ("version", None, "has no released version: None"),
    ],
)
def test_impossible_fields(intact: Path, field: str, value: object, message: str) -> None:
    change(intact, **{field: value})
    with pytest.raises(Damaged, match=message):
        read_manifest(intact)


def test_version_2_had_no_alphabet(intact: Path) -> None:
    content = json.loads((intact / MANIFEST).read_text())
    del content["alphabet"]
    (intact / MANIFEST).write_text(sealed(content | {"version": 2}))
    assert read_manifest(intact).alphabet is None
    change(intact, version=3, alphabet="dna")
    assert read_manifest(intact).alphabet == "dna"


def test_a_model_saved_before_values_could_look_ahead_has_values_that_do_not(intact: Path) -> None:
    content = json.loads((intact / MANIFEST).read_text())
    content["config"].pop("model.values_ahead", None)
    (intact / MANIFEST).write_text(sealed(content))
    assert read_manifest(intact).config["model.values_ahead"] is False
    content["config"]["model.values_ahead"] = None
    (intact / MANIFEST).write_text(sealed(content))
    assert read_manifest(intact).config["model.values_ahead"] is None


def test_a_changed_manifest_is_noticed(intact: Path) -> None:
    content = json.loads((intact / MANIFEST).read_text())
    content["config"]["model.dim"] = 16
    (intact / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(Damaged, match="has changed since it was written"):
        read_manifest(intact)


def test_a_field_that_is_missing_is_named(intact: Path) -> None:
    content = json.loads((intact / MANIFEST).read_text())
    del content["ranks"]
    (intact / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(Damaged, match="lacks the field 'ranks'"):
        read_manifest(intact)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "cannot be read: "),
        (b"\xff\xfe\xfd", "cannot be read: "),
        (b"[1, 2]", r"cannot be read: \[1, 2\] instead of fields"),
        (b"[" * 100_000, "cannot be read: "),
        (b'{"version": ' + b"9" * 5000 + b"}", "cannot be read: "),
    ],
)
def test_a_file_that_is_no_manifest(intact: Path, text: bytes, message: str) -> None:
    (intact / MANIFEST).write_bytes(text)
    with pytest.raises(Damaged, match=message):
        read_manifest(intact)


def test_a_manifest_that_is_too_large_is_not_read(intact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megabase.pipeline.checkpoint.manifest.MAX_MANIFEST_BYTES", 100)
    with pytest.raises(Damaged, match="has more than 0 MiB"):
        read_manifest(intact)


def test_a_newer_manifest_is_not_damage(intact: Path) -> None:
    change(intact, version=99, unheard_of=1)
    with pytest.raises(UserError, match="update megabase"):
        find_obvious_damage(intact)


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


@pytest.mark.slow
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
