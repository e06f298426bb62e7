"""Compressors whose programs are installed, and those that fail."""

import shutil
from pathlib import Path

import pytest

from megabase.datamodules.index.shard_index import ShardIndex
from megabase.pipeline.inference.evaluation import compressors
from megabase.pipeline.inference.evaluation.compressors import Program, compress


@pytest.fixture
def index(lambda_shards: Path) -> ShardIndex:
    return ShardIndex.open(lambda_shards)


def program(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, script: str) -> None:
    """Install a program."""
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


@pytest.mark.slow
def test_the_letters_of_the_split_are_compressed(
    index: ShardIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program(tmp_path, monkeypatch, "half", 'head -c 1000 "$1" > "$1.co"; grep -q "^[ACGT]*$" "$1"')
    program(tmp_path, monkeypatch, "fails", "exit 3")
    program(tmp_path, monkeypatch, "silent", "exit 0")
    program(tmp_path, monkeypatch, "slow", "exec sleep 60")
    names = ("half", "fails", "silent", "slow", "missing")
    monkeypatch.setattr(compressors, "TIMEOUT_S", 0.5)
    monkeypatch.setattr(compressors, "PROGRAMS", tuple(Program(name, ("IN",), "IN.co") for name in names))
    found = compress(index, "valid")
    assert [(each.name, each.bases) for each in found] == [("half", 4850)]
    assert found[0].bits_per_base == pytest.approx(8000 / 4850)
    messages = capsys.readouterr().err
    assert "fails is left out: it ended with code 3" in messages
    assert "silent is left out" in messages and "slow is left out: it took more than 0.5 s" in messages
    monkeypatch.setattr(compressors, "MOST_BASES", 2000)
    assert compress(index, "valid")[0].bases == 2000


@pytest.mark.skipif(shutil.which("xz") is None, reason="xz is not installed")
def test_a_real_program(index: ShardIndex) -> None:
    found = {each.name: each.bits_per_base for each in compress(index, "train")}
    assert 1.9 < found["xz"] < 2.4


def test_no_program(index: ShardIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compressors.shutil, "which", lambda name: None)
    assert compress(index, "valid") == []
