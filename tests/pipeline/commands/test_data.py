"""What `megabase data` prints. tests/datamodules/report/test_description.py tests the numbers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from megabase.datamodules.prepare.run import prepare
from megabase.datamodules.report import description
from megabase.pipeline import cli


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    for name, length in (("one", 3000), ("two", 50)):
        (tmp_path / f"{name}.fa").write_text(f">{name}\n" + "ACGN" * length + "\n")
    files = [tmp_path / "two.fa", tmp_path / "one.fa"]
    prepare(files, tmp_path / "shards", valid="0.5", jobs=1, progress=False)
    return tmp_path / "shards"


def test_tables_hold_the_numbers(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", str(shards)]) == 0
    first, records, heading, *rows = capsys.readouterr().out.splitlines()
    assert first == f"{shards}: 2 records in 1 shard, 16.5 KiB, alphabet dna"
    assert records == "longest record one, 12,000 bases; shortest two, 200"
    assert heading.split()[:6] == ["split", "segments", "bases", "letters", "1k", "windows"]
    found = description.describe(description.ShardIndex.open(shards))
    for row, part in zip(rows, found.splits, strict=False):
        numbers = (part.segments, part.bases, part.letters, *part.windows.values())
        assert row.split() == [part.split, *(f"{number:,}" for number in numbers)]
    assert [row.split() for row in rows[-3:]] == [["file", "bases"], ["one.fa", "12,000"], ["two.fa", "200"]]
    assert len({len(row) for row in rows[: len(found.splits)]}) == 1


def test_windows_of_one_length_and_what_is_in_none(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", str(shards), "--length", "4000"]) == 0
    *_, heading, train, valid = capsys.readouterr().out.splitlines()
    assert heading.split()[:4] == ["split", "windows", "of", "4,000"]
    # Segments of 6,000 and 100 bases, in each split.
    numbers = ["1", "4,000", "(65.6%)", "100", "(1.6%)", "2,000", "(32.8%)", "0", "(0.0%)"]
    assert train.split() == ["train", *numbers] and valid.split() == ["valid", *numbers]


def test_short_records_get_a_hint(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", str(shards), "--length", "6050"]) == 0
    printed = capsys.readouterr().out
    assert (
        "train: 2 segments with 100.0% of its bases are shorter than 6,050: data.pack=true joins short ones (1 window "
        "instead of 0), or lower data.length" in printed
    )
    assert cli.main(["data", str(shards), "--length", "6050", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)["length"][0]
    assert report["windows"] == 0 and report["short_bases"] == 6100 and report["packed_windows"] == 1
    assert cli.main(["data", str(shards), "--length", "90000"]) == 0
    assert "are shorter than 90,000: lower data.length" in capsys.readouterr().out
    assert cli.main(["data", str(shards), "--length", "0"]) == 2
    assert "--length 0: must be at least 1 base" in capsys.readouterr().err


def test_leakage_is_shown_where_it_was_measured(
    shards: Path, lambda_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["data", str(shards)]) == 0  # too few 31-mers
    assert "31-mers" not in capsys.readouterr().out
    assert cli.main(["data", str(lambda_shards)]) == 0
    heading, train, valid = capsys.readouterr().out.splitlines()[2:5]
    assert heading.endswith("31-mers in train")
    assert train.split()[-1] == "-" and valid.split()[-1].endswith("%")


def test_many_files_are_cut_short(
    shards: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = description.describe(description.ShardIndex.open(shards))
    many = {f"file-{number}.fa": number for number in range(20)}
    monkeypatch.setattr(description, "describe", lambda index: dataclasses.replace(found, sources=many))
    assert cli.main(["data", str(shards)]) == 0
    printed = capsys.readouterr().out
    assert ["file-19.fa", "19"] in [line.split() for line in printed.splitlines()]
    assert "file-3.fa" not in printed and printed.endswith("and 12 more files\n")
