"""`megabase prepare --check`: every kind of damage is found and named."""

import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset

from megabase.datamodules.errors import DataError
from megabase.datamodules.index.index_file import BLOCK_BYTES, INDEX_NAME
from megabase.datamodules.index.shard_index import ShardIndex
from megabase.datamodules.prepare.check import Damage, DamageError, check
from megabase.datamodules.prepare.foreign import index_tars
from megabase.datamodules.prepare.run import prepare

OPTIONS: dict[str, Any] = {"valid": 0.2, "shard_bytes": 4096, "progress": False}
LENGTHS = (9000, 5000, 3000, 200, 100, 1)


@pytest.fixture
def fastas(tmp_path: Path, write_fasta: Callable[[Path, dict[str, bytes]], Path]) -> list[Path]:
    """Files of three records each, the first the largest; the last ones are small enough to share a unit."""
    generator = np.random.default_rng(1)
    bases = np.frombuffer(b"ACGTNacgt", np.uint8)
    paths = []
    for number, length in enumerate(LENGTHS):
        records = {f"r{number}.{part}": generator.choice(bases, length).tobytes() for part in range(3)}
        paths.append(write_fasta(tmp_path / f"f{number}.fa", records))
    return paths


@pytest.fixture
def shards(fastas: list[Path], tmp_path: Path) -> ShardIndex:
    return prepare(fastas, tmp_path / "out", jobs=1, **OPTIONS)


def flip(shards: ShardIndex, shard: str, at: int) -> None:
    with (Path(shards.directory) / shard).open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def damages(shards: ShardIndex, jobs: int = 1) -> list[Damage]:
    with pytest.raises(DamageError) as error:
        check(shards.directory, jobs, progress=False)
    assert "prepare --check" not in str(error.value)
    return error.value.damages


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [1, 2])
def test_the_check_reads_every_base(shards: ShardIndex, jobs: int) -> None:
    assert check(shards.directory, jobs, progress=False) == 3 * sum(LENGTHS)
    segments, row = shards.segments, 7
    flip(shards, segments.shard[row], int(segments.offset[row] + segments.length[row] - 1))
    with pytest.raises(
        DamageError, match=r"out: damage in 1 of 33 segments, 1 of \d+ shards: copy this shard again"
    ):
        check(shards.directory, jobs, progress=False)
    flip(shards, segments.shard[0], int(segments.offset[0]))
    found = damages(shards, jobs)
    assert [damage[:3] for damage in found] == [
        (segments.shard[number], segments.record[number], segments.split[number]) for number in (0, row)
    ]
    assert all(damage.problem == "differs from its checksum" for damage in found)


def test_all_damaged_blocks_of_a_segment_are_one_damage(tmp_path: Path, lambda_fasta: Path) -> None:
    shards = prepare([lambda_fasta], tmp_path / "out", valid=0.2, progress=False)
    offset, start = int(shards.segments.offset[0]), BLOCK_BYTES + 5
    assert shards.segments.record[0] == shards.segments.record[1]
    for at in (start, start + 1, 3 * BLOCK_BYTES):
        flip(shards, shards.segments.shard[0], offset + at)
    (found,) = damages(shards)
    assert (found.split, found.start, found.end) == ("train", BLOCK_BYTES, 4 * BLOCK_BYTES)
    assert found.problem == "differs from its checksum (2 blocks of 8 KiB)"
    flip(shards, shards.segments.shard[1], int(shards.segments.offset[1]))
    _, second = damages(shards)
    first = int(shards.segments.start[1])
    assert (second.split, second.start, second.end) == ("valid", first, first + BLOCK_BYTES)


def test_check_finds_members_at_other_offsets(shards: ShardIndex) -> None:
    shard = Path(shards.directory) / shards.segments.shard[0]
    flip(shards, shard.name, 0)  # the name of a member, then its size
    (found,) = damages(shards)
    assert found[:3] == (shard.name, "", "") and found.problem.startswith("the tar is damaged")
    flip(shards, shard.name, 0)
    text = shard.read_bytes()
    shard.write_bytes(text.replace(b'"record": "r0.0"', b'"record": "r9.9"'))
    found = damages(shards)
    assert {damage.problem for damage in found} == {"here the shard has record 'r9.9'"}
    assert [damage[1:3] for damage in found] == [("r0.0", "train"), ("r0.0", "valid")]
    shard.write_bytes(text)
    path = Path(shards.directory) / INDEX_NAME
    table = pq.read_table(path)
    offsets = table.column("offset").to_numpy().copy()
    offsets[-1] += 600
    at = table.schema.get_field_index("offset")
    pq.write_table(table.set_column(at, "offset", [offsets]), path)
    (found,) = damages(shards)
    assert found.record == "r5.2" and found.problem.startswith("not in a member of the tar")


def test_check_reads_tars_of_other_programs(lambda_bases: bytes, tmp_path: Path) -> None:
    lines = b"\n".join(lambda_bases[at : at + 60] for at in range(0, len(lambda_bases), 60))
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        writer.write({"__key__": "a", "fa": b">x\n" + lines + b"\n>y\nACGT\n"})
        writer.write({"__key__": "b", "txt": "acgt\n", "json": {"record": "z", "source": "s"}})
    index = index_tars(tmp_path, valid=0.1, progress=False)
    assert check(tmp_path, progress=False) == len(lambda_bases) + 8
    flip(index, "a.tar", int(index.segments.offset[1]))
    (found,) = damages(index)
    assert found[:2] == ("a.tar", "x")


def test_the_check_finds_shards_cut_short_or_missing(shards: ShardIndex) -> None:
    shard = Path(shards.directory) / "shard-00001.tar"
    os.truncate(shard, shard.stat().st_size - 512)
    with pytest.raises(DataError, match=r"shard-00001.tar: \d+ bytes, the index says"):
        check(shards.directory, progress=False)
    shard.unlink()
    with pytest.raises(DataError, match=r"shard-00001.tar: the index names this shard but it does not exist"):
        check(shards.directory, progress=False)


def test_check_ignores_other_files_in_a_tar(lambda_bases: bytes, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, content in (("._k.json", b"\0\5"), ("k.seq", lambda_bases), ("k.json", b"{}")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    index_tars(tmp_path, progress=False)
    assert check(tmp_path, progress=False) == len(lambda_bases)
