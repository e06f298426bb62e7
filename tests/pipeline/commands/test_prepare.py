"""What `megabase prepare` prints and takes. tests/datamodules/prepare tests the shards."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megabase.pipeline import cli


@pytest.fixture
def fasta(tmp_path: Path) -> Path:
    """Three records of 200 bases."""
    bases = np.random.default_rng(1).choice(np.frombuffer(b"ACGT", np.uint8), 600).tobytes().decode()
    path = tmp_path / "a.fa"
    path.write_text("".join(f">r{number}\n{bases[200 * number :][:200]}\n" for number in range(3)))
    return path


@pytest.mark.parametrize(
    "order", ["{fasta} --valid 0.1 {out}", "--valid 0.1 {fasta} {out}", "{fasta} {out} --valid 0.1"]
)
def test_options_stand_anywhere(
    fasta: Path, tmp_path: Path, order: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = order.format(fasta=fasta, out=tmp_path / "out").split()
    assert cli.main(["prepare", *words, "--jobs", "1"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"{tmp_path}/out: 3 records in 1 shard\n  train             540 bases\n  valid")


def test_damage_is_a_table(
    fasta: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert cli.main(["prepare", str(fasta), str(out), "--jobs", "1"]) == 0
    assert cli.main(["prepare", "--check", str(out), "--jobs", "1"]) == 0
    assert "600 bases match their checksums" in capsys.readouterr().out
    shard = out / "shard-00000.tar"
    content = fasta.read_bytes().split(b"\n")
    shard.write_bytes(shard.read_bytes().replace(content[1], content[3]).replace(content[5], content[3]))
    assert cli.main(["prepare", "--check", str(out), "--jobs", "1"]) == 2
    printed = capsys.readouterr()
    heading, *rows = printed.out.splitlines()
    assert heading.split() == ["shard", "record", "split", "place", "problem"]
    assert [row.split()[:4] for row in rows] == [
        [shard.name, name, "train", "0-200"] for name in ("r0", "r2")
    ]
    assert "out: damage in 2 of 3 segments, 1 of 1 shards: copy this shard again" in printed.err
    monkeypatch.setattr("megabase.pipeline.commands.prepare.MOST_DAMAGES", 1)
    assert cli.main(["prepare", "--check", str(out), "--jobs", "1"]) == 2
    assert capsys.readouterr().out.endswith("and 1 more\n")


def test_without_validation_the_way_to_get_it_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.fa").write_text(">a\nACGTACGTAC\n")
    assert cli.main(["prepare", str(tmp_path / "a.fa"), str(tmp_path / "out")]) == 0
    assert "out: nothing is for validation" in (said := capsys.readouterr().err)
    assert "prepare into another directory with --valid 0.1" in said
    (tmp_path / "out" / "index.parquet").unlink()
    assert cli.main(["index", str(tmp_path / "out")]) == 0
    index = tmp_path / "out" / "index.parquet"
    assert f"remove {index} and index again with --valid 0.1" in capsys.readouterr().err
    index.unlink()
    assert cli.main(["index", str(tmp_path / "out"), "--valid", "0.1"]) == 0
    assert "nothing is for validation" not in capsys.readouterr().err


def test_text_and_protein_are_summed_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, protein = tmp_path / "a.txt", tmp_path / "a.faa"
    text.write_text("In the beginning")
    protein.write_text(">p\nMKVLAEFX\n")
    assert cli.main(["prepare", str(text), str(tmp_path / "text"), "--alphabet", "bytes"]) == 0
    assert capsys.readouterr().out.endswith("1 record in 1 shard\n  train              16 bytes\n")
    assert cli.main(["prepare", str(protein), str(tmp_path / "protein"), "--alphabet", "protein"]) == 0
    assert "8 residues, 1 of them not one of the 20 amino acids (X, B," in capsys.readouterr().out
    assert cli.main(["data", str(tmp_path / "protein"), "--length", "9"]) == 0
    printed = capsys.readouterr().out
    assert "longest record p, 8 residues" in printed and "base" not in printed
    assert cli.main(["prepare", "--check", str(tmp_path / "protein"), "--jobs", "1"]) == 0
    assert "8 residues match their checksums" in capsys.readouterr().out
