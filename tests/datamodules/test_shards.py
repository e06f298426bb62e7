"""The writer: what lies in the tars, and that only the whole is ever seen."""

import json
from pathlib import Path

import numpy as np
import pytest
import webdataset

from datamodules.alphabet import Alphabet
from datamodules.errors import DataError
from datamodules.index import ShardIndex
from datamodules.records import Record
from datamodules.shards import ShardWriter
from datamodules.splits import Segment


def members(index: ShardIndex) -> list[dict[str, bytes]]:
    """What the webdataset library itself reads."""
    urls = [str(index.directory / name) for name in index.sizes]
    return list(webdataset.WebDataset(urls, shardshuffle=False))


def test_webdataset_reads_every_record(gappy_shards: ShardIndex, gappy_records: dict[str, bytes]) -> None:
    found = members(gappy_shards)
    assert [sample["__key__"] for sample in found] == [
        f"{number:06d}" for number in range(len(gappy_records))
    ]
    assert [sample["seq"] for sample in found] == list(gappy_records.values())
    assert [json.loads(sample["json"]) for sample in found] == [
        {"record": name, "description": "made up", "source": "gappy.fa", "length": len(bases)}
        for name, bases in gappy_records.items()
    ]


def test_reading_through_the_index_is_reading_the_tar(gappy_shards: ShardIndex) -> None:
    in_tars = {json.loads(sample["json"])["record"]: sample["seq"] for sample in members(gappy_shards)}
    segments = gappy_shards.segments
    rebuilt: dict[str, bytes] = dict.fromkeys(in_tars, b"")
    for row in range(len(segments)):
        name = segments.record[row]
        assert segments.start[row] == len(rebuilt[name])  # rows of a record follow each other without a hole
        rebuilt[name] += gappy_shards.read(row, 0, int(segments.length[row])).tobytes()
    assert rebuilt == in_tars


def test_shards_keep_to_their_size_unless_one_record_is_larger(gappy_shards: ShardIndex) -> None:
    assert len(gappy_shards.sizes) > 1
    for name, size in gappy_shards.sizes.items():
        alone = len(list(webdataset.WebDataset(str(gappy_shards.directory / name), shardshuffle=False))) == 1
        assert size <= 8192 or alone


def test_the_same_records_give_the_same_bytes(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        with ShardWriter(tmp_path / folder, Alphabet.named("dna")) as writer:
            writer.write(Record("r", "", "f", b"ACGT"), [Segment("train", 0, 4)])
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == ["index.parquet", "shard-00000.tar"]
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_many_records_have_many_rows_in_order(tmp_path: Path) -> None:
    count = 5000  # more than one packed batch of rows
    with ShardWriter(tmp_path / "out", Alphabet.named("dna"), shard_bytes=1 << 20) as writer:
        for number in range(count):
            writer.write(
                Record(f"r{number}", "", "f", b"ACGT"[number % 4 :]), [Segment("train", 0, 4 - number % 4)]
            )
    index = ShardIndex.open(tmp_path / "out")
    assert index.segments.record.tolist() == [f"r{number}" for number in range(count)]
    assert all(index.read(row, 0, 1)[0] == b"ACGT"[row % 4] for row in range(count))
    index.verify()


def test_nothing_is_seen_before_all_is_there(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "out", Alphabet.named("dna")) as writer:
        writer.write(Record("r", "", "f", b"ACGT"), [Segment("train", 0, 4)])
        assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_a_writer_that_fails_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), ShardWriter(tmp_path / "out", Alphabet.named("dna")) as writer:
        writer.write(Record("r", "", "f", b"ACGT"), [Segment("train", 0, 4)])
        raise error
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_never_touched(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with (
        pytest.raises(DataError, match="out: exists already"),
        ShardWriter(tmp_path / "out", Alphabet.named("dna")),
    ):
        pass
    (tmp_path / "new.partial").mkdir()
    (tmp_path / "new.partial" / "mine").touch()
    with (
        pytest.raises(DataError, match=r"new\.partial: exists"),
        ShardWriter(tmp_path / "new", Alphabet.named("dna")),
    ):
        pass
    assert (tmp_path / "new.partial" / "mine").exists()
    with pytest.raises(DataError, match="shard size 0 bytes"):
        ShardWriter(tmp_path / "out", Alphabet.named("dna"), shard_bytes=0)


def test_gaps_in_the_index_are_the_data_s(gappy_shards: ShardIndex) -> None:
    segments, letters = gappy_shards.segments, b"ACGTacgt"
    for row in range(len(segments)):
        bases = gappy_shards.read(row, 0, int(segments.length[row]))
        is_gap = np.zeros(len(bases), bool)
        for start, length in segments.gaps[segments.gap_bounds[row] : segments.gap_bounds[row + 1]]:
            is_gap[start : start + length] = True
        assert (is_gap == ~np.isin(bases, np.frombuffer(letters, np.uint8))).all()
