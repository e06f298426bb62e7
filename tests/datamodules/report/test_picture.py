"""The picture of `megabase data`, against counts made by hand from the records."""

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megabase.datamodules.errors import DataError
from megabase.datamodules.index.shard_index import ShardIndex
from megabase.datamodules.prepare.run import prepare
from megabase.datamodules.report import picture

LETTERS = b"ACGTacgt"


def test_composition_is_counted_by_hand(gappy_shards: ShardIndex, gappy_records: dict[str, bytes]) -> None:
    whole = b"".join(gappy_records.values()).upper()
    shares = picture.composition(gappy_shards)
    assert list(shares) == ["A", "C", "G", "T", "other"]
    for letter in "ACGT":
        assert shares[letter] == pytest.approx(whole.count(letter.encode()) / len(whole))
    assert sum(shares.values()) == pytest.approx(1)


@given(column=st.integers(1, 700))
def test_marks_are_the_columns_that_a_gap_touches(
    gappy_shards: ShardIndex, gappy_records: dict[str, bytes], column: int
) -> None:
    bases = np.frombuffer(gappy_records["r0"], np.uint8)
    gap = ~np.isin(bases, np.frombuffer(LETTERS, np.uint8))
    padded = np.append(gap, np.zeros(-len(gap) % column, bool)).reshape(-1, column)
    wanted = np.repeat(padded.any(axis=1), column)
    segments = gappy_shards.segments
    runs = picture.runs_of_gaps(segments, np.flatnonzero(segments.record == "r0"), column)
    marked = np.zeros(len(wanted), bool)
    for start, length in runs:
        assert not marked[start : start + length].any()
        marked[start : start + length] = True
    assert (marked == wanted).all()
    assert len(runs) == np.count_nonzero(np.diff(wanted, prepend=False) & wanted)


def test_a_record_without_gaps_has_no_marks(lambda_shards: ShardIndex) -> None:
    assert not len(picture.runs_of_gaps(lambda_shards.segments, np.array([0, 1]), 10))


def test_longest_records_come_first(gappy_shards: ShardIndex) -> None:
    assert picture.longest_records(gappy_shards.segments, most=3) == {"r0": 5000, "r5": 4096, "r3": 777}


def test_the_picture_is_drawn(gappy_shards: ShardIndex, tmp_path: Path) -> None:
    path = tmp_path / "shards.png"
    picture.draw(gappy_shards, path)
    assert path.read_bytes().startswith(b"\x89PNG\r\n")
    assert [file.name for file in tmp_path.iterdir()] == ["shards.png"]


def test_picture_of_text(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_bytes("Größe, size\n".encode() * 40)
    index = prepare([tmp_path / "book.txt"], tmp_path / "shards", alphabet="bytes", progress=False)
    shares = picture.composition(index)
    assert len(shares) == 257
    assert shares["e"] == pytest.approx(2 / 14)
    assert shares["0a"] == pytest.approx(1 / 14)
    picture.draw(index, tmp_path / "text.png")
    assert (tmp_path / "text.png").exists()


@pytest.mark.parametrize("name", ["shards.jpg", "no/such/place.png"])
def test_a_picture_that_cannot_be_written_is_refused(
    gappy_shards: ShardIndex, tmp_path: Path, name: str
) -> None:
    with pytest.raises(DataError, match=re.escape(f"--picture {tmp_path / name}: ")):
        picture.draw(gappy_shards, tmp_path / name)
    assert not list(tmp_path.iterdir())
