"""What `megabase data` says, against counts made by hand from the records."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megabase.datamodules.errors import DataError
from megabase.datamodules.index.shard_index import ShardIndex
from megabase.datamodules.prepare.run import prepare
from megabase.datamodules.report import description as report

LETTERS = b"ACGTacgt"


def parts_of(records: dict[str, bytes]) -> dict[str, list[bytes]]:
    """Split -> its segments: `gappy_shards` has valid=0.2 and test="r3"."""
    parts: dict[str, list[bytes]] = {"train": [], "valid": [], "test": []}
    for name, bases in records.items():
        cut = 0 if name == "r3" else len(bases) - round(0.2 * len(bases))
        parts["test" if name == "r3" else "valid"].append(bases[cut:])
        parts["train"].append(bases[:cut])
    return {split: [part for part in segments if part] for split, segments in parts.items()}


def letters_in(bases: bytes) -> int:
    return sum(base in LETTERS for base in bases)


def windows_in(segment: bytes, length: int) -> int:
    starts = range(0, len(segment) - length + 1, length)
    return sum(letters_in(segment[start : start + length]) >= length / 2 for start in starts)


def test_numbers_are_those_counted_by_hand(gappy_shards: ShardIndex, gappy_records: dict[str, bytes]) -> None:
    found = report.describe(gappy_shards)
    assert found.alphabet == "dna"
    assert found.records == sum(1 for bases in gappy_records.values() if bases)
    tars = list(Path(found.directory).glob("*.tar"))
    assert found.shards == len(tars)
    assert found.bytes == sum(tar.stat().st_size for tar in tars)
    assert found.longest == report.RecordReport("r0", 5000)
    assert found.shortest == report.RecordReport("r2", 1)
    assert [part.split for part in found.splits] == ["train", "valid", "test"]
    parts = parts_of(gappy_records)
    for part in found.splits:
        segments = parts[part.split]
        assert part.segments == len(segments)
        assert part.bases == sum(map(len, segments))
        assert part.letters == sum(map(letters_in, segments))
        for name, length in report.LENGTHS.items():
            assert part.windows[name] == sum(windows_in(segment, length) for segment in segments)
    assert found.splits[0].windows["1k"] > 0
    assert sum(found.sources.values()) == sum(map(len, gappy_records.values()))


def test_the_text_holds_the_numbers_in_aligned_columns(gappy_shards: ShardIndex) -> None:
    found = report.describe(gappy_shards)
    lines = report.text(found).split("\n")
    assert lines[0].startswith(f"{found.directory}: {found.records} records in {found.shards} shards, ")
    assert "longest record r0, 5,000 bases; shortest r2, 1" in lines[1]
    table = lines[-1 - len(found.splits) :]
    assert len(set(map(len, table))) == 1
    for line, part in zip(table[1:], found.splits, strict=True):
        numbers = (part.segments, part.bases, part.letters, *part.windows.values())
        assert line.split() == [part.split, *(f"{number:,}" for number in numbers)]


def test_json_is_plain(gappy_shards: ShardIndex) -> None:
    found = report.describe(gappy_shards)
    assert json.loads(json.dumps(found.as_dict()))["splits"][0]["windows"] == found.splits[0].windows


def test_many_sources_are_cut_short(gappy_shards: ShardIndex) -> None:
    found = report.describe(gappy_shards)
    many = {f"file-{number}.fa": number for number in range(20)}
    shown = report.text(report.Description(**{**found.__dict__, "sources": many}))
    assert "19 bases from file-19.fa" in shown
    assert "file-3.fa" not in shown
    assert "and 12 more files" in shown


def test_composition_is_counted_by_hand(gappy_shards: ShardIndex, gappy_records: dict[str, bytes]) -> None:
    whole = b"".join(gappy_records.values()).upper()
    shares = report.composition(gappy_shards)
    assert list(shares) == ["A", "C", "G", "T", "other"]
    for letter in "ACGT":
        assert shares[letter] == pytest.approx(whole.count(letter.encode()) / len(whole))
    assert sum(shares.values()) == pytest.approx(1)


def test_the_sample_is_bounded_and_reaches_everywhere(ecoli_shards: ShardIndex) -> None:
    segments = ecoli_shards.segments
    blocks = list(report.sample(segments, 1_000_000))
    taken = sum(length for _, _, length in blocks)
    assert abs(taken - 1_000_000) <= 2 * (1 << 16)
    starts = np.array([segments.start[row] + start for row, start, _ in blocks])
    assert starts.min() < 500_000
    assert starts.max() > 4_400_000
    assert np.diff(starts).max() < 10 * (1 << 16)
    assert sum(length for *_, length in report.sample(segments, 1 << 40)) == segments.length.sum()


@given(column=st.integers(1, 700))
def test_marks_are_the_columns_that_a_gap_touches(
    gappy_shards: ShardIndex, gappy_records: dict[str, bytes], column: int
) -> None:
    bases = np.frombuffer(gappy_records["r0"], np.uint8)
    gap = ~np.isin(bases, np.frombuffer(LETTERS, np.uint8))
    padded = np.append(gap, np.zeros(-len(gap) % column, bool)).reshape(-1, column)
    wanted = np.repeat(padded.any(axis=1), column)
    segments = gappy_shards.segments
    runs = report.runs_of_gaps(segments, np.flatnonzero(segments.record == "r0"), column)
    marked = np.zeros(len(wanted), bool)
    for start, length in runs:
        assert not marked[start : start + length].any()
        marked[start : start + length] = True
    assert (marked == wanted).all()
    assert len(runs) == np.count_nonzero(np.diff(wanted, prepend=False) & wanted)


def test_a_record_without_gaps_has_no_marks(lambda_shards: ShardIndex) -> None:
    assert not len(report.runs_of_gaps(lambda_shards.segments, np.array([0, 1]), 10))


def test_longest_records_come_first(gappy_shards: ShardIndex) -> None:
    assert report.longest_records(gappy_shards.segments, most=3) == {"r0": 5000, "r5": 4096, "r3": 777}


def test_the_picture_is_drawn(gappy_shards: ShardIndex, tmp_path: Path) -> None:
    path = tmp_path / "shards.png"
    report.draw(gappy_shards, path)
    assert path.read_bytes().startswith(b"\x89PNG\r\n")
    assert [file.name for file in tmp_path.iterdir()] == ["shards.png"]


def test_text_has_a_picture_too(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_bytes("Größe, size\n".encode() * 40)
    index = prepare([tmp_path / "book.txt"], tmp_path / "shards", alphabet="bytes", progress=False)
    shares = report.composition(index)
    assert len(shares) == 257
    assert shares["e"] == pytest.approx(2 / 14)
    assert shares["0a"] == pytest.approx(1 / 14)
    report.draw(index, tmp_path / "text.png")
    assert (tmp_path / "text.png").exists()


@pytest.mark.parametrize("name", ["shards.jpg", "no/such/place.png"])
def test_a_picture_that_cannot_be_written_is_refused(
    gappy_shards: ShardIndex, tmp_path: Path, name: str
) -> None:
    with pytest.raises(DataError, match=re.escape(f"--picture {tmp_path / name}: ")):
        report.draw(gappy_shards, tmp_path / name)
    assert not list(tmp_path.iterdir())
