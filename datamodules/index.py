"""The shard set as numbers: which segment of which record lies where, and byte-range reads of it.

`index.parquet` has one row per segment (a contiguous part of a record in one split). `Segments` is that table
as numpy columns, all that planning needs; `ShardIndex` adds the directory, checks it, and reads bases through
memory maps, so a window costs its own bytes and nothing else.
"""

import hashlib
import json
import mmap
import zlib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from datamodules.alphabet import Alphabet
from datamodules.errors import DataError

INDEX_NAME = "index.parquet"
INDEX_VERSION = 1
METADATA_KEY = b"megabase"

SCHEMA = pa.schema(
    [
        ("record", pa.string()),
        ("split", pa.string()),
        ("start", pa.int64()),  # bases, in the record
        ("length", pa.int64()),  # bases
        ("shard", pa.string()),
        ("offset", pa.int64()),  # bytes, in the shard file, of the segment's first base
        ("crc32", pa.uint32()),  # of the segment's bytes
        ("gaps", pa.list_(pa.list_(pa.int64()))),  # [start, length] runs that are no letters, in the segment
    ]
)


@dataclass(frozen=True, eq=False)
class Segments:
    """The index as columns, one entry per row.

    record, split, shard: object arrays of str. start, length, offset: int64. crc32: uint32.
    gaps: (total gaps, 2) int64 [start, length], row by row; row i's are gaps[gap_bounds[i] : gap_bounds[i +
        1]].
    """

    record: NDArray[np.object_]
    split: NDArray[np.object_]
    start: NDArray[np.int64]
    length: NDArray[np.int64]
    shard: NDArray[np.object_]
    offset: NDArray[np.int64]
    crc32: NDArray[np.uint32]
    gaps: NDArray[np.int64]
    gap_bounds: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.record)

    @classmethod
    def from_table(cls, table: pa.Table) -> "Segments":
        """The columns of a table of `SCHEMA`."""
        columns = {name: table.column(name).to_numpy() for name in SCHEMA.names if name != "gaps"}
        gaps = table.column("gaps").combine_chunks()
        counts = gaps.value_lengths().to_numpy(zero_copy_only=False)
        return cls(
            **columns,
            gaps=gaps.flatten().flatten().to_numpy(zero_copy_only=False).astype(np.int64).reshape(-1, 2),
            gap_bounds=np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]),
        )

    def rows_of(self, split: str) -> NDArray[np.int64]:
        """Row numbers of a split, in order."""
        return np.flatnonzero(self.split == split)

    def gap_length(self, row: int) -> int:
        """Bases of a row that are no letters."""
        return int(self.gaps[self.gap_bounds[row] : self.gap_bounds[row + 1], 1].sum())

    def splits(self) -> list[str]:
        """The splits that have a row, sorted."""
        return sorted(set(self.split))

    @cached_property
    def identity(self) -> str:
        """A checksum of what the order of training is made of: records, splits, lengths, gaps and the bases.

        The same for shards of the same input wherever they lie and however they were cut into files.
        """
        digest = hashlib.sha256()
        for names in (self.record, self.split):
            digest.update("\0".join(names).encode() + b"\n")
        for numbers in (self.start, self.length, self.crc32, self.gaps, self.gap_bounds):
            digest.update(np.ascontiguousarray(numbers).tobytes())
        return digest.hexdigest()[:16]


@dataclass(eq=False)
class ShardIndex:
    """An opened shard directory.

    directory: where index and shards lie. alphabet: what the shards were prepared for.
    sizes: bytes of every shard. segments: the rows of the index.
    A copy sent to another process maps the files anew.
    """

    directory: Path
    alphabet: Alphabet
    sizes: dict[str, int]
    segments: Segments
    _maps: dict[str, NDArray[np.uint8]] = field(default_factory=dict, repr=False)

    @classmethod
    def open(cls, directory: str | Path) -> "ShardIndex":
        """Open the shards in `directory` and check that they are all there.

        Raises DataError for a directory that is missing or has no index, an index that is damaged or newer
        than this version reads, and a shard that is missing or of another size than the index says.
        """
        directory = Path(directory)
        metadata, table = _read_index(directory)
        sizes: dict[str, int] = metadata["shards"]
        for name, size in sizes.items():
            _check_shard(directory / name, size)
        return cls(directory, Alphabet.named(metadata["alphabet"]), sizes, Segments.from_table(table))

    def read(self, row: int, start: int, length: int) -> NDArray[np.uint8]:
        """Bases [start, start + length) of a row's segment: (length,) uint8, a read-only view of the shard.

        Raises IndexError for a range outside the segment.
        """
        segments = self.segments
        if start < 0 or length < 0 or start + length > segments.length[row]:
            raise IndexError(
                f"[{start}, {start + length}) is outside row {row} of {segments.length[row]} bases"
            )
        first = int(segments.offset[row]) + start
        return self._map(segments.shard[row])[first : first + length]

    def verify(self) -> None:
        """Read every base and compare checksums; raises DataError naming the first segment that differs."""
        segments = self.segments
        for row in range(len(segments)):
            if zlib.crc32(self.read(row, 0, int(segments.length[row])).data) != segments.crc32[row]:
                raise DataError(
                    f"{self.directory / segments.shard[row]}: the {segments.split[row]} part of record "
                    f"{segments.record[row]!r} differs from its checksum: prepare the shards again"
                )

    def _map(self, shard: str) -> NDArray[np.uint8]:
        if shard not in self._maps:
            with (self.directory / shard).open("rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._maps[shard] = np.frombuffer(mapped, np.uint8)
        return self._maps[shard]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}


def write_index(
    path: Path, batches: list[pa.RecordBatch], alphabet: Alphabet, sizes: dict[str, int], sources: list[str]
) -> None:
    """Write rows of `SCHEMA` and the metadata: `sizes` in bytes per shard, `sources` names of input files."""
    metadata = {"version": INDEX_VERSION, "alphabet": alphabet.name, "shards": sizes, "sources": sources}
    schema = SCHEMA.with_metadata({METADATA_KEY: json.dumps(metadata).encode()})
    pq.write_table(pa.Table.from_batches(batches, SCHEMA).cast(schema), path)


def _read_index(directory: Path) -> tuple[dict[str, Any], pa.Table]:
    path = directory / INDEX_NAME
    if not directory.is_dir():
        problem = "is a file, not a directory of shards" if directory.exists() else "no such directory"
        raise DataError(f"{directory}: {problem}: make shards with `megabase prepare INPUT... OUTPUT`")
    if not path.is_file():
        raise DataError(
            f"{directory}: no {INDEX_NAME} in it: make shards with `megabase prepare "
            "INPUT... OUTPUT`, and give OUTPUT here"
        )
    try:
        schema = pq.read_schema(path)
        metadata = json.loads(schema.metadata[METADATA_KEY])
        version = int(metadata["version"])
    except (pa.ArrowException, TypeError, KeyError, ValueError) as error:
        raise DataError(f"{path}: not an index of megabase, or damaged: prepare the shards again") from error
    if version > INDEX_VERSION:
        raise DataError(
            f"{path}: written by a newer megabase (index version {version}; this one reads up to "
            f"{INDEX_VERSION}): upgrade megabase or prepare the shards again"
        )
    try:
        return metadata, pq.read_table(path, schema=schema)
    except pa.ArrowException as error:
        raise DataError(f"{path}: damaged ({error}): prepare the shards again") from error


def _check_shard(path: Path, size: int) -> None:
    if not path.is_file():
        raise DataError(
            f"{path}: the index names this shard but it is not there: copy the whole directory again"
        )
    if (found := path.stat().st_size) != size:
        raise DataError(f"{path}: {found} bytes, the index says {size}: copy or prepare the shards again")
