"""The writer: what lies in the tars, as webdataset reads them, and the rows that say where."""

import json
from pathlib import Path

import numpy as np
import pytest
import webdataset

from megabase.datamodules.alphabet import Alphabet
from megabase.datamodules.errors import DataError
from megabase.datamodules.index.segments import Segment
from megabase.datamodules.index.shard_index import ShardIndex
from megabase.datamodules.prepare.records import Record
from megabase.datamodules.prepare.writer import ShardWriter

DNA = Alphabet.named("dna")


def members(index: ShardIndex) -> list[dict[str, bytes]]:
    """What the webdataset library itself reads."""
    urls = [str(Path(index.directory) / name) for name in index.sizes]
    return list(webdataset.WebDataset(urls, shardshuffle=False))


def test_webdataset_reads_every_record(gappy_shards: ShardIndex, gappy_records: dict[str, bytes]) -> None:
    found = members(gappy_shards)
    assert [sample["__key__"] for sample in found] == [
        f"00000-{number:06d}" for number in range(len(gappy_records))
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
        path = str(Path(gappy_shards.directory) / name)
        assert size <= 8192 or len(list(webdataset.WebDataset(path, shardshuffle=False))) == 1


def test_the_same_records_give_the_same_bytes(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        with ShardWriter(tmp_path / folder, 3, DNA) as writer:
            writer.write(Record("r", "", "f", b"ACGT"), [Segment("train", 0, 4)])
            writer.finish()
    (name,) = (path.name for path in (tmp_path / "a").iterdir())
    assert name == "part-00003-00000.tar"
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_many_records_have_many_rows_in_order(tmp_path: Path) -> None:
    count = 5000  # more than one packed batch of rows
    with ShardWriter(tmp_path, 0, DNA, shard_bytes=1 << 20) as writer:
        for number in range(count):
            bases = b"ACGT"[number % 4 :]
            writer.write(Record(f"r{number}", "", "f", bases), [Segment("train", 0, len(bases))])
        part = writer.finish()
    assert part.rows["record"].to_pylist() == [f"r{number}" for number in range(count)]
    assert part.bases == part.rows["length"].to_numpy().sum() == 12_500
    shards = {name: (tmp_path / name).read_bytes() for name in part.sizes}
    assert {name: len(content) for name, content in shards.items()} == part.sizes
    for number, row in enumerate(part.rows.select(["shard", "offset", "length"]).to_pylist()):
        assert shards[row["shard"]][row["offset"] :][: row["length"]] == b"ACGT"[number % 4 :]


def test_records_without_a_row_are_listed(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, 0, DNA) as writer:
        writer.write(Record("empty", "", "a.fa", b""), [])
        writer.write(Record("cut", "", "b.fa", b"ACGT"), [Segment("valid", 1, 2, ((1, 1),))])
        part = writer.finish()
    assert part.unlisted == ["empty"] and part.sources == ["a.fa", "b.fa"]
    (row,) = part.rows.to_pylist()
    assert (row["source"], row["split"], row["start"], row["intervals"]) == ("b.fa", "valid", 1, [[1, 1]])
    with pytest.raises(DataError, match="shard size 0 bytes"):
        ShardWriter(tmp_path, 0, DNA, shard_bytes=0)


def test_gaps_in_the_index_are_those_of_the_bases(gappy_shards: ShardIndex) -> None:
    segments, letters = gappy_shards.segments, b"ACGTacgt"
    for row in range(len(segments)):
        bases = gappy_shards.read(row, 0, int(segments.length[row]))
        is_gap = np.zeros(len(bases), bool)
        for start, length in segments.gaps[segments.gap_bounds[row] : segments.gap_bounds[row + 1]]:
            is_gap[start : start + length] = True
        assert (is_gap == ~np.isin(bases, np.frombuffer(letters, np.uint8))).all()
