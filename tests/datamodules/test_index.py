"""Opening and reading a shard set, and every way in which one can be broken."""

import json
import pickle
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from datamodules.errors import DataError
from datamodules.index import METADATA_KEY, ShardIndex
from datamodules.prepare import prepare

COLUMNS = ["record", "split", "start", "length", "shard", "offset", "crc32", "gaps"]


@pytest.fixture
def copy(lambda_shards: ShardIndex, tmp_path: Path) -> Path:
    """Shards that a test may break."""
    return Path(shutil.copytree(lambda_shards.directory, tmp_path / "copy"))


def test_the_index_says_what_the_contract_promises(lambda_shards: ShardIndex) -> None:
    path = lambda_shards.directory / "index.parquet"
    assert pq.read_schema(path).names == COLUMNS
    metadata = json.loads(pq.read_metadata(path).metadata[b"megabase"])
    size = (lambda_shards.directory / "shard-00000.tar").stat().st_size
    assert metadata == {
        "version": 1,
        "alphabet": "dna",
        "shards": {"shard-00000.tar": size},
        "sources": ["lambda_phage.fna.gz"],
    }
    segments = lambda_shards.segments
    assert segments.splits() == ["test", "train", "valid"]
    assert segments.length.tolist() == [33_952, 9_700, 4_850]
    assert segments.start.tolist() == [0, 33_952, 43_652]


def test_reads_are_the_genome_s_bytes(lambda_shards: ShardIndex, lambda_bases: bytes) -> None:
    assert lambda_shards.read(1, 100, 50).tobytes() == lambda_bases[34_052:34_102]
    assert lambda_shards.read(2, 0, 4_850).tobytes() == lambda_bases[-4_850:]
    assert len(lambda_shards.read(0, 33_952, 0)) == 0


@pytest.mark.parametrize(("start", "length"), [(-1, 4), (0, 9_701), (9_700, 1), (4, -1)])
def test_no_read_leaves_its_segment(lambda_shards: ShardIndex, start: int, length: int) -> None:
    with pytest.raises(IndexError, match="outside row 1 of 9700 bases"):
        lambda_shards.read(1, start, length)


def test_a_copy_for_another_process_reads_the_same(lambda_shards: ShardIndex) -> None:
    first = lambda_shards.read(0, 0, 99)
    sent = pickle.dumps(lambda_shards)
    assert len(sent) < 10_000  # no bases travel
    assert (pickle.loads(sent).read(0, 0, 99) == first).all()


def test_directories_without_shards_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="missing: no such directory: make shards with `megabase prepare"):
        ShardIndex.open(tmp_path / "missing")
    with pytest.raises(DataError, match=r"no index.parquet in it.*`megabase prepare INPUT... OUTPUT`"):
        ShardIndex.open(tmp_path)


def test_an_index_of_a_newer_version_is_refused(copy: Path) -> None:
    table = pq.read_table(copy / "index.parquet")
    metadata = json.loads(table.schema.metadata[METADATA_KEY]) | {"version": 2}
    table = table.replace_schema_metadata({METADATA_KEY: json.dumps(metadata)})
    pq.write_table(table, copy / "index.parquet")
    with pytest.raises(
        DataError, match=r"newer megabase \(index version 2; this one reads up to 1\): upgrade"
    ):
        ShardIndex.open(copy)


def test_what_is_no_index_is_refused(copy: Path) -> None:
    table = pq.read_table(copy / "index.parquet")
    pq.write_table(table.replace_schema_metadata(None), copy / "index.parquet")
    with pytest.raises(DataError, match=r"index.parquet: not an index of megabase"):
        ShardIndex.open(copy)
    (copy / "index.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"index.parquet: not an index of megabase, or damaged"):
        ShardIndex.open(copy)


def test_a_missing_shard_is_named(copy: Path) -> None:
    (copy / "shard-00000.tar").unlink()
    with pytest.raises(DataError, match=r"shard-00000.tar: the index names this shard but it is not there"):
        ShardIndex.open(copy)


def test_a_shard_of_another_size_is_named(copy: Path) -> None:
    with (copy / "shard-00000.tar").open("ab") as shard:
        size = shard.seek(0, 2)
        shard.truncate(size - 512)
    with pytest.raises(DataError, match=rf"shard-00000.tar: {size - 512} bytes, the index says {size}"):
        ShardIndex.open(copy)


def test_a_changed_base_is_found_by_its_checksum(copy: Path) -> None:
    index = ShardIndex.open(copy)
    index.verify()
    with (copy / "shard-00000.tar").open("r+b") as shard:
        shard.seek(int(index.segments.offset[1]) + 7)
        shard.write(b"N")
    with pytest.raises(
        DataError, match=r"shard-00000.tar: the valid part of record .* differs from its checksum"
    ):
        ShardIndex.open(copy).verify()


def test_the_identity_is_of_the_bases_and_splits_not_of_the_files(
    lambda_shards: ShardIndex, tmp_path: Path
) -> None:
    two_genomes = [tmp_path / name for name in ("one.fa", "two.fa")]
    for path, letter in zip(two_genomes, "AC", strict=True):
        path.write_text(f">{path.stem}\n" + f"{letter}GT" * 900 + "\n")
    whole = prepare(two_genomes, tmp_path / "whole", valid="0.1", progress=False)
    cut = prepare(two_genomes, tmp_path / "cut", valid="0.1", shard_bytes=1024, progress=False)
    assert len(cut.sizes) > len(whole.sizes)
    assert cut.segments.identity == whole.segments.identity
    others = [
        prepare(two_genomes, tmp_path / "split", valid="0.2", progress=False),
        prepare(two_genomes[::-1], tmp_path / "order", valid="0.1", progress=False),
        lambda_shards,
    ]
    assert len({index.segments.identity for index in (whole, *others)}) == 4
