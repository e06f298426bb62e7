"""index.parquet: what it holds, and every way in which it can be wrong."""

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from megabase.datamodules.alphabet import Alphabet
from megabase.datamodules.errors import DataError
from megabase.datamodules.index.index_file import (
    METADATA_KEY,
    SCHEMA,
    write_index,
)
from megabase.datamodules.index.shard_index import ShardIndex

COLUMNS = "record source split start length shard offset line_bases line_bytes crc32 blocks gaps intervals"


DNA = Alphabet.named("dna")


@pytest.fixture
def copy(lambda_shards: ShardIndex, tmp_path: Path) -> Path:
    """Shards that a test may break."""
    return Path(shutil.copytree(lambda_shards.directory, tmp_path / "copy"))


def test_index_has_the_columns_and_metadata_of_the_contract(lambda_shards: ShardIndex) -> None:
    path = lambda_shards.directory / "index.parquet"
    assert pq.read_schema(path).names == COLUMNS.split()
    metadata = json.loads(pq.read_metadata(path).metadata[b"megabase"])
    size = (lambda_shards.directory / "shard-00000.tar").stat().st_size
    assert metadata == {
        "version": 2,
        "alphabet": "dna",
        "shards": {"shard-00000.tar": size},
        "sources": ["lambda_phage.fna.gz"],
    }
    segments = lambda_shards.segments
    assert segments.splits() == ["test", "train", "valid"]
    assert segments.length.tolist() == [33_952, 9_700, 4_850]
    assert segments.start.tolist() == [0, 33_952, 43_652]


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (3, r"newer megabase \(index version 3; this one reads 2\): upgrade megabase or prepare"),
        (1, r"older megabase \(index version 1; this one reads 2\): prepare the shards again"),
    ],
)
def test_index_of_another_version_is_refused(copy: Path, version: int, message: str) -> None:
    table = pq.read_table(copy / "index.parquet")
    metadata = json.loads(table.schema.metadata[METADATA_KEY]) | {"version": version}
    table = table.replace_schema_metadata({METADATA_KEY: json.dumps(metadata)})
    pq.write_table(table, copy / "index.parquet")
    with pytest.raises(DataError, match=message):
        ShardIndex.open(copy)


def test_file_that_is_not_an_index_is_refused(copy: Path) -> None:
    table = pq.read_table(copy / "index.parquet")
    pq.write_table(table.replace_schema_metadata(None), copy / "index.parquet")
    with pytest.raises(DataError, match=r"index.parquet: not an index of megabase"):
        ShardIndex.open(copy)
    (copy / "index.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"index.parquet: not an index of megabase, or damaged"):
        ShardIndex.open(copy)


def change_index(copy: Path, shards: object = None, rows: str | None = None) -> None:
    """Name other shards in an index: in its metadata, and in the rows."""
    table = pq.read_table(copy / "index.parquet")
    metadata = json.loads(table.schema.metadata[METADATA_KEY])
    metadata["shards"] = shards
    if rows is not None:
        table = table.set_column(
            table.column_names.index("shard"), SCHEMA.field("shard"), [[rows] * len(table)]
        )
    table = table.replace_schema_metadata({METADATA_KEY: json.dumps(metadata)})
    pq.write_table(table, copy / "index.parquet")


@pytest.mark.parametrize("name", ["../x.tar", "/etc/passwd", "a/b.tar", "..", ".", "", "x\0.tar"])
def test_no_shard_lies_elsewhere(copy: Path, name: str) -> None:
    (copy.parent / "x.tar").write_bytes(b"secret")
    change_index(copy, {name: 6}, name)
    with pytest.raises(
        DataError, match=r"index.parquet: names a shard that is not a file of its directory, "
    ):
        ShardIndex.open(copy)


def test_no_record_lies_in_a_shard_that_was_not_checked(copy: Path) -> None:
    size = (copy / "shard-00000.tar").stat().st_size
    change_index(copy, {"shard-00000.tar": size}, "../x.tar")
    with pytest.raises(DataError, match=r"lies in shard '../x.tar', whose size is missing"):
        ShardIndex.open(copy)


@pytest.mark.parametrize("shards", [None, [], {"shard-00000.tar": -1}, {"shard-00000.tar": "1"}])
def test_an_index_without_sizes_is_refused(copy: Path, shards: object) -> None:
    change_index(copy, shards)
    with pytest.raises(DataError, match="does not hold the sizes of its shards"):
        ShardIndex.open(copy)


def test_index_without_rows_opens(tmp_path: Path) -> None:
    write_index(tmp_path / "index.parquet", [], DNA, {}, [])
    segments = ShardIndex.open(tmp_path).segments
    assert len(segments) == 0 and segments.block_bounds.tolist() == [0] and segments.intervals.shape == (0, 2)
