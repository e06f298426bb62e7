"""Opening and reading a shard set, and every way in which one can be broken."""

import pickle
import shutil
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megabase.datamodules.alphabet import Alphabet
from megabase.datamodules.errors import DataError
from megabase.datamodules.index.index_file import (
    BLOCK_BYTES,
    SCHEMA,
    segment_row,
    segments_of,
    write_index,
)
from megabase.datamodules.index.segments import Segment
from megabase.datamodules.index.shard_index import ShardIndex

DNA = Alphabet.named("dna")


@pytest.fixture
def copy(lambda_shards: ShardIndex, tmp_path: Path) -> Path:
    """Shards that a test may break."""
    return Path(shutil.copytree(lambda_shards.directory, tmp_path / "copy"))


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


def test_a_missing_shard_is_named(copy: Path) -> None:
    (copy / "shard-00000.tar").unlink()
    with pytest.raises(DataError, match=r"shard-00000.tar: the index names this shard but it does not exist"):
        ShardIndex.open(copy)


def test_a_shard_of_another_size_is_named(copy: Path) -> None:
    with (copy / "shard-00000.tar").open("ab") as shard:
        size = shard.seek(0, 2)
        shard.truncate(size - 512)
    with pytest.raises(DataError, match=rf"shard-00000.tar: {size - 512} bytes, the index says {size}"):
        ShardIndex.open(copy)


def verify(index: ShardIndex) -> None:
    """Compare every segment with its checksums."""
    for row in range(len(index.segments)):
        index.verify_row(row)


def test_changed_base_is_found_by_its_checksum(copy: Path) -> None:
    index = ShardIndex.open(copy)
    verify(index)
    with (copy / "shard-00000.tar").open("r+b") as shard:
        shard.seek(int(index.segments.offset[1]) + 7)
        shard.write(b"N")
    with pytest.raises(DataError, match=r"shard-00000.tar: record .*iffer.* from .* checksum"):
        verify(ShardIndex.open(copy))
    assert index.verify_row(0) == 33_952


def test_a_read_of_a_changed_base_names_the_place_and_the_ways_out(copy: Path) -> None:
    index = ShardIndex.open(copy)
    at = BLOCK_BYTES + 9
    with (copy / "shard-00000.tar").open("r+b") as shard:
        shard.seek(int(index.segments.offset[0]) + at)
        shard.write(b"-")
    place = rf"shard-00000.tar: record '\S+': bases \[{BLOCK_BYTES}, {2 * BLOCK_BYTES}\) differ from their"
    ways = r"`megabase prepare --check`, copy the shard again, or .*data.on_error: skip"
    for start, length in ((at, 1), (BLOCK_BYTES - 1, 2), (0, 33_952), (2 * BLOCK_BYTES - 1, 5)):
        with pytest.raises(DataError, match=f"{place} .*{ways}"):
            index.read(0, start, length)
    for start, length in ((0, BLOCK_BYTES), (2 * BLOCK_BYTES, 1)):
        assert len(index.read(0, start, length)) == length


def test_shard_truncated_while_it_is_read_is_named(copy: Path) -> None:
    index = ShardIndex.open(copy)
    index.read(0, 0, 10)
    with (copy / "shard-00000.tar").open("r+b") as shard:
        shard.truncate(20_000)
    with pytest.raises(
        DataError,
        match=r"shard-00000.tar: record .*: ends at byte 20000, .*: copy .* again, .*on_error: skip",
    ):
        index.read(0, 2 * BLOCK_BYTES, 100)
    assert len(index.read(0, 0, 100)) == 100


def test_shard_removed_while_it_is_read_is_named(copy: Path) -> None:
    index = ShardIndex.open(copy)
    (copy / "shard-00000.tar").unlink()
    with pytest.raises(DataError, match=r"shard-00000.tar: record .*: cannot be read \(No such file"):
        index.read(0, 0, 10)


class Member(NamedTuple):
    """A record as it lies in a file: its bases, with a line end behind every `line_bases` of them unless 0."""

    bases: bytes
    line_bases: int
    end: bytes

    @property
    def written(self) -> bytes:
        step = self.line_bases or len(self.bases)
        lines = [self.bases[at : at + step] for at in range(0, len(self.bases), step)]
        return self.end.join(lines)

    def place(self, base: int) -> int:
        return base + len(self.end) * (base // self.line_bases) if self.line_bases else base


@pytest.fixture(scope="module")
def members() -> list[Member]:
    bases = np.random.default_rng(5).choice(np.frombuffer(b"ACGTN", np.uint8), 3 * BLOCK_BYTES + 77).tobytes()
    return [
        Member(bases, 0, b""),
        Member(bases[:50_000], 60, b"\n"),
        Member(bases[5:], 61, b"\r\n"),
        Member(bases[: 2 * BLOCK_BYTES], 1, b"\n"),
    ]


@pytest.fixture(scope="module")
def by_hand(members: list[Member], tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    """Each member cut in two segments at base 12,345, which is in the middle of a line."""
    directory = tmp_path_factory.mktemp("by_hand")
    rows, shard = [], b"header"
    for number, member in enumerate(members):
        for split, start, end in (("train", 0, 12_345), ("valid", 12_345, len(member.bases))):
            rows.append(
                segment_row(
                    f"r{number}",
                    "hand.fa",
                    Segment(split, start, end - start, ((3, 5), (10, 20)) if number == 1 else ()),
                    "a.tar",
                    len(shard) + member.place(start),
                    memoryview(member.bases)[start:end],
                    DNA,
                    member.line_bases,
                    member.line_bases + len(member.end) if member.line_bases else 0,
                )
            )
        shard += member.written + b"\n>next"
    (directory / "a.tar").write_bytes(shard)
    batch = pa.RecordBatch.from_pylist(rows, SCHEMA)
    write_index(directory / "index.parquet", [batch], DNA, {"a.tar": len(shard)}, ["hand.fa"])
    return ShardIndex.open(directory)


PLACES = st.integers(0, 3) | st.builds(
    lambda block, beside: max(block * BLOCK_BYTES + beside, 0), st.integers(0, 3), st.integers(-62, 62)
) | st.integers(0, 4 * BLOCK_BYTES)  # fmt: skip


@given(row=st.integers(0, 7), ends=st.tuples(PLACES, PLACES))
@settings(max_examples=300, deadline=None)
def test_any_range_equals_the_record(
    by_hand: ShardIndex, members: list[Member], row: int, ends: tuple[int, int]
) -> None:
    segments = by_hand.segments
    start, end = sorted(min(end, int(segments.length[row])) for end in ends)
    first = int(segments.start[row])
    expected = members[row // 2].bases[first + start : first + end]
    assert by_hand.read(row, start, end - start).tobytes() == expected
    out = np.full(end - start + 2, 7, np.uint8)
    by_hand.read_into(row, start, out[1:-1])
    assert out.tobytes() == b"\7" + expected + b"\7"


def test_rows_hold_checksums_gaps_and_intervals(by_hand: ShardIndex, members: list[Member]) -> None:
    segments, bases = by_hand.segments, members[0].bases[12_345:]
    blocks = segments.blocks[segments.block_bounds[1] : segments.block_bounds[2]]
    assert blocks.tolist() == [
        zlib.crc32(bases[at : at + BLOCK_BYTES]) for at in range(0, len(bases), BLOCK_BYTES)
    ]
    assert segments.crc32[1] == zlib.crc32(bases)
    assert int(segments.length[1] - segments.letters[1]) == bases.count(b"N")
    assert segments.intervals.tolist() == [[3, 5], [10, 20]] * 2
    assert segments.interval_bounds.tolist() == [0, 0, 0, 2, 4, 4, 4, 4, 4]
    assert set(segments.source) == {"hand.fa"}
    verify(by_hand)


def test_intervals_change_the_identity(by_hand: ShardIndex) -> None:
    table = pq.read_table(Path(by_hand.directory) / "index.parquet")
    nothing = pa.array([[]] * len(table), SCHEMA.field("intervals").type)
    without = segments_of(table.drop(["intervals"]).append_column("intervals", nothing))
    assert without.identity != by_hand.segments.identity
