"""The shard set as numbers: which segment of which record lies where, and byte-range reads of it.

`index.parquet` has one row per segment (a contiguous part of a record in one split). `Segments` is that table
as numpy columns, all that planning needs; `ShardIndex` adds the store of bytes (a local directory, or a URL)
and reads bases out of it. A read costs the window's own bytes and those of the checksum blocks it begins and
ends in: every block is compared with its checksum each time it is read.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from isal import isal_zlib
from numpy.typing import NDArray

from megabase.datamodules.alphabet import Alphabet
from megabase.datamodules.errors import DataError
from megabase.datamodules.index.store import Buffer, Store, StoreError, open_store
from megabase.datamodules.prepare.splits import Segment

INDEX_NAME = "index.parquet"
INDEX_VERSION = 2
METADATA_KEY = b"megabase"

BLOCK_BYTES = 8 << 10
"""Bytes under one checksum: a window is verified by reading little beyond its own."""

SCHEMA = pa.schema(
    [
        ("record", pa.string()),
        ("source", pa.string()),  # name of the input file: what mixtures are weighed by
        ("split", pa.string()),
        ("start", pa.int64()),  # bases, in the record
        ("length", pa.int64()),  # bases
        ("shard", pa.string()),
        ("offset", pa.int64()),  # bytes, in the shard file, of the segment's first base
        ("line_bases", pa.int64()),  # bases per line where line ends lie between them (FASTA members), else 0
        ("line_bytes", pa.int64()),  # bytes per line, its end included; 0 likewise
        ("crc32", pa.uint32()),  # of the segment's bases
        ("blocks", pa.list_(pa.uint32())),  # crc32 of every BLOCK_BYTES of them; the last may be shorter
        ("gaps", pa.list_(pa.list_(pa.int64()))),  # [start, length] runs that are no letters, in the segment
        ("intervals", pa.list_(pa.list_(pa.int64()))),  # [start, length] of BED intervals; none: all of it
    ]
)
_SINCE_VERSION_2 = ("source", "line_bases", "line_bytes", "blocks", "intervals")
_ROWS_PER_BATCH = 4096
_VERIFY_BYTES = 512 * BLOCK_BYTES


def segment_row(
    record: str,
    source: str,
    segment: Segment,
    shard: str,
    offset: int,
    bases: memoryview,
    alphabet: Alphabet,
    line_bases: int = 0,
    line_bytes: int = 0,
    intervals: Sequence[tuple[int, int]] = (),
) -> dict[str, object]:
    """One row of `SCHEMA`.

    record, source: names of the record and of its input file. shard: file name. offset: byte in the shard of
    the segment's first base. bases: the segment's bases, line ends taken out. intervals: (start, length)
    relative to the segment. line_bases, line_bytes: see `SCHEMA`; lines are counted from the record's first
    base, so a segment may start anywhere in one.
    """
    blocks = [isal_zlib.crc32(bases[at : at + BLOCK_BYTES]) for at in range(0, len(bases), BLOCK_BYTES)]
    return {
        "record": record,
        "source": source,
        "split": segment.split,
        "start": segment.start,
        "length": segment.length,
        "shard": shard,
        "offset": offset,
        "line_bases": line_bases,
        "line_bytes": line_bytes,
        "crc32": isal_zlib.crc32(bases),
        "blocks": blocks,
        "gaps": alphabet.gaps(np.frombuffer(bases, np.uint8)).tolist(),
        "intervals": [list(interval) for interval in intervals],
    }


class RowBatches:
    """Rows of `SCHEMA` as they come, in Arrow's batches: these hold a row in about a hundred bytes."""

    def __init__(self) -> None:
        self._rows: list[dict[str, object]] = []
        self._batches: list[pa.RecordBatch] = []

    def add(self, row: dict[str, object]) -> None:
        """Append a row (see `segment_row`)."""
        self._rows.append(row)
        if len(self._rows) == _ROWS_PER_BATCH:
            self._pack()

    def all(self) -> list[pa.RecordBatch]:
        """Every row so far."""
        self._pack()
        return self._batches

    def _pack(self) -> None:
        self._batches.append(pa.RecordBatch.from_pylist(self._rows, SCHEMA))
        self._rows = []


@dataclass(frozen=True, eq=False)
class Segments:
    """The index as columns, one entry per row.

    record, source, split, shard: object arrays of str. start, length, offset, line_bases, line_bytes: int64.
    crc32: uint32. gaps, intervals: (total, 2) int64 [start, length], row by row; row i's gaps are
    gaps[gap_bounds[i] : gap_bounds[i + 1]]. blocks: (total,) uint32 checksums, row by row likewise; an index
    of version 1 has none.
    """

    record: NDArray[np.object_]
    source: NDArray[np.object_]
    split: NDArray[np.object_]
    start: NDArray[np.int64]
    length: NDArray[np.int64]
    shard: NDArray[np.object_]
    offset: NDArray[np.int64]
    line_bases: NDArray[np.int64]
    line_bytes: NDArray[np.int64]
    crc32: NDArray[np.uint32]
    blocks: NDArray[np.uint32]
    block_bounds: NDArray[np.int64]
    gaps: NDArray[np.int64]
    gap_bounds: NDArray[np.int64]
    intervals: NDArray[np.int64]
    interval_bounds: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.record)

    @classmethod
    def from_table(cls, table: pa.Table) -> "Segments":
        """The columns of a table of `SCHEMA`, or of that of version 1, which lacks some."""
        table = _completed(table)
        plain = [field.name for field in SCHEMA if not pa.types.is_list(field.type)]
        blocks, block_bounds = _flat(table, "blocks")
        gaps, gap_bounds = _flat(table, "gaps")
        intervals, interval_bounds = _flat(table, "intervals")
        return cls(
            **{name: table.column(name).to_numpy() for name in plain},
            blocks=_values(blocks, np.uint32),
            block_bounds=block_bounds,
            gaps=_values(gaps.flatten(), np.int64).reshape(-1, 2),
            gap_bounds=gap_bounds,
            intervals=_values(intervals.flatten(), np.int64).reshape(-1, 2),
            interval_bounds=interval_bounds,
        )

    def rows_of(self, split: str) -> NDArray[np.int64]:
        """Row numbers of a split, in order."""
        return np.flatnonzero(self.split == split)

    def gap_length(self, row: int) -> int:
        """Bases of a row that are no letters."""
        return int(self.gaps[self.gap_bounds[row] : self.gap_bounds[row + 1], 1].sum())

    def letters_of(self, split: str) -> int:
        """Bases of a split that are letters."""
        rows = self.rows_of(split)
        return int(self.length[rows].sum()) - sum(self.gap_length(row) for row in rows)

    def splits(self) -> list[str]:
        """The splits that have a row, sorted."""
        return sorted(set(self.split))

    @cached_property
    def identity(self) -> str:
        """A checksum of what the order of training is made of: records, splits, lengths, gaps, the bases, and
        intervals where there are any.

        The same for shards of the same input wherever they lie and however they were cut into files. Runs
        keep it: the same input must give the same value in every version.
        """
        digest = hashlib.sha256()
        for names in (self.record, self.split):
            digest.update("\0".join(names).encode() + b"\n")
        numbers = [self.start, self.length, self.crc32, self.gaps, self.gap_bounds]
        if len(self.intervals):
            numbers += [self.intervals, self.interval_bounds]
        for column in numbers:
            digest.update(np.ascontiguousarray(column).tobytes())
        return digest.hexdigest()[:16]


@dataclass(eq=False)
class ShardIndex:
    """An opened shard set.

    directory: where index and shards lie, a path or a URL. alphabet: what the shards were prepared for.
    sizes: bytes of every shard. segments: the rows of the index. store: reads the bytes.
    A copy sent to another process opens files and connections anew.
    """

    directory: Path | str
    alphabet: Alphabet
    sizes: dict[str, int]
    segments: Segments
    store: Store

    @classmethod
    def open(cls, directory: str | Path) -> "ShardIndex":
        """Open the shards in `directory`, a path or any URL fsspec knows, and check that they are all there.

        Raises DataError for a directory that is missing or has no index, an index that is damaged or newer
        than this version reads, or that names a shard elsewhere than in the directory, a shard that is missing or of
        another size than the index says, and a URL that cannot be read or that does not serve ranges of bytes.
        """
        store = open_store(directory)
        metadata, table = _read_index(store)
        sizes: Any = metadata.get("shards")
        _check_shards(store.name_of(INDEX_NAME), sizes, table)
        store.check(sizes)
        return cls(store.root, Alphabet.named(metadata["alphabet"]), sizes, Segments.from_table(table), store)

    def read(self, row: int, start: int, length: int) -> NDArray[np.uint8]:
        """Bases [start, start + length) of a row's segment: (length,) uint8. Raises as `read_into`."""
        if length < 0:
            raise self._outside(row, start, length)
        out = np.empty(length, np.uint8)
        self.read_into(row, start, out)
        return out

    def read_into(self, row: int, start: int, out: NDArray[np.uint8]) -> None:
        """Fill `out`, contiguous (length,) uint8, with the bases of a row's segment from `start` on.

        Raises IndexError for a range outside the segment; DataError, naming shard and record, for bytes that
        cannot be read, are missing, or differ from their checksum twice.
        """
        segments, start = self.segments, int(start)
        end, total = start + len(out), segments.length.item(row)
        if start < 0 or end > total:
            raise self._outside(row, start, len(out))
        if start == end:
            return
        low, high, blocks = start, end, segments.block_bounds.item(row)
        if checked := segments.block_bounds.item(row + 1) > blocks:
            low = start - start % BLOCK_BYTES
            high = min(end + -end % BLOCK_BYTES, total)
        parts = bytearray(start - low), out.data, bytearray(high - end)
        for last in (False, True):
            self._fetch(row, low, parts)
            bad = self._first_bad_block(blocks, low // BLOCK_BYTES, parts) if checked else None
            if bad is None:
                return
            if last:
                raise DataError(self._damage(row, bad))

    def verify(self) -> None:
        """Read every base and compare checksums; raises DataError naming the first segment that differs."""
        for row in range(len(self.segments)):
            self.verify_row(row)

    def verify_row(self, row: int) -> int:
        """Read a segment and compare it with its checksums; returns its bases. Raises as `read_into`."""
        total, crc = self.segments.length.item(row), 0
        for start in range(0, total, _VERIFY_BYTES):
            crc = isal_zlib.crc32(self.read(row, start, min(_VERIFY_BYTES, total - start)).data, crc)
        if crc != self.segments.crc32[row]:
            raise DataError(
                f"{self._place(row)}: the {self.segments.split[row]} part differs from its checksum: copy the "
                "shard again, or prepare the shards again"
            )
        return total

    def _outside(self, row: int, start: int, length: int) -> IndexError:
        total = self.segments.length[row]
        return IndexError(f"[{start}, {start + length}) is outside row {row} of {total} bases")

    def _fetch(self, row: int, low: int, parts: Sequence[Buffer]) -> None:
        """Fill `parts`, which follow one another, with the segment's bases from `low` on."""
        segments = self.segments
        shard, offset = segments.shard[row], segments.offset.item(row)
        line_bases = segments.line_bases.item(row)
        try:
            if not line_bases:
                self.store.read_into(shard, offset + low, parts)
                return
            line_bytes = segments.line_bytes.item(row)
            column = segments.start.item(row) % line_bases
            first, behind = (
                offset - column + at // line_bases * line_bytes + at % line_bases
                for at in (column + low, column + low + sum(map(len, parts)) - 1)
            )
            span = np.empty(behind + 1 - first, np.uint8)
            self.store.read_into(shard, first, (span.data,))
        except StoreError as error:
            raise DataError(
                f"{self._place(row)}: {error}, or leave such windows out with data.on_error: skip"
            ) from error
        bases = _without_line_ends(span, (column + low) % line_bases, line_bases, line_bytes).data
        for part in parts:
            part[:], bases = bases[: len(part)], bases[len(part) :]

    def _first_bad_block(self, blocks: int, block: int, parts: Sequence[Buffer]) -> int | None:
        """The number, within its segment, of the first block that differs from its checksum.

        blocks: where the segment's checksums begin. block: the number of the block that `parts` begin with.
        """
        head, body, tail = parts
        wanted, crc = self.segments.blocks, isal_zlib.crc32(head)
        start, end = 0, BLOCK_BYTES - len(head)
        while end < len(body):
            if isal_zlib.crc32(body[start:end], crc) != wanted.item(blocks + block):
                return block
            block, crc = block + 1, 0
            start, end = end, end + BLOCK_BYTES
        crc = isal_zlib.crc32(tail, isal_zlib.crc32(body[start:], crc))
        return block if crc != wanted.item(blocks + block) else None

    def _damage(self, row: int, block: int) -> str:
        start = block * BLOCK_BYTES
        end = min(start + BLOCK_BYTES, self.segments.length.item(row))
        first = self.segments.start.item(row)
        return (
            f"{self._place(row)}: bases [{first + start}, {first + end}) differ from their checksum: find all such "
            "places with `megabase prepare --check`, copy the shard again, or leave such windows out with "
            "data.on_error: skip"
        )

    def _place(self, row: int) -> str:
        return f"{self.store.name_of(self.segments.shard[row])}: record {self.segments.record[row]!r}"


def write_index(
    path: Path, batches: list[pa.RecordBatch], alphabet: Alphabet, sizes: dict[str, int], sources: list[str]
) -> None:
    """Write rows of `SCHEMA` and the metadata: `sizes` in bytes per shard, `sources` names of input files."""
    metadata = {"version": INDEX_VERSION, "alphabet": alphabet.name, "shards": sizes, "sources": sources}
    schema = SCHEMA.with_metadata({METADATA_KEY: json.dumps(metadata).encode()})
    with path.open("wb") as file:  # pyarrow takes a path with a colon for a URL
        pq.write_table(pa.Table.from_batches(batches, SCHEMA).cast(schema), file)


def _without_line_ends(
    span: NDArray[np.uint8], column: int, line_bases: int, line_bytes: int
) -> NDArray[np.uint8]:
    """The bases in a span of bytes that begins at `column` of a line."""
    rest, whole = span[line_bytes - column :], line_bases - column
    lines = -(-len(rest) // line_bytes)
    grid = np.zeros(lines * line_bytes, np.uint8)
    grid[: len(rest)] = rest
    bases = grid.reshape(lines, line_bytes)[:, :line_bases].reshape(-1)
    used = len(rest) // line_bytes * line_bases + min(len(rest) % line_bytes, line_bases)
    return np.concatenate([span[:whole], bases[:used]])


def _completed(table: pa.Table) -> pa.Table:
    """A table with the columns that version 1 of the index did not have."""
    empty: dict[str, Any] = {"source": "", "line_bases": 0, "line_bytes": 0, "blocks": [], "intervals": []}
    for name in set(empty) - set(table.column_names):
        column = pa.array([empty[name]] * len(table), SCHEMA.field(name).type)
        table = table.append_column(SCHEMA.field(name), column)
    return table


def _flat(table: pa.Table, name: str) -> tuple[pa.Array, NDArray[np.int64]]:
    """A column of lists -> their elements in one array, and (rows + 1,) where each row's begin."""
    lists = table.column(name).combine_chunks()
    counts = lists.value_lengths().to_numpy(zero_copy_only=False)
    return lists.flatten(), np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


def _values(array: pa.Array, kind: type[np.integer]) -> NDArray[Any]:
    return array.to_numpy(zero_copy_only=False).astype(kind)


def _check_shards(path: str, sizes: Any, table: pa.Table) -> None:
    """Raise DataError for a shard that is no file of the directory: an index may come from anybody."""
    if not isinstance(sizes, dict) or any(type(size) is not int or size < 0 for size in sizes.values()):
        raise DataError(f"{path}: does not say the sizes of its shards: prepare the shards again")
    for name in sizes:
        if name in ("", ".", "..") or "/" in name or "\0" in name:
            raise DataError(
                f"{path}: names a shard that is no file of its directory, {name[:80]!r}: do not use it, or prepare the"
                " shards again"
            )
    for name in table.column("shard").unique().to_pylist():
        if name not in sizes:
            raise DataError(
                f"{path}: a record lies in a shard that it has no size of, {str(name)[:80]!r}: prepare the shards again"
            )


def _read_index(store: Store) -> tuple[dict[str, Any], pa.Table]:
    path = store.name_of(INDEX_NAME)
    try:
        source = pa.BufferReader(store.read_whole(INDEX_NAME))
    except FileNotFoundError:
        raise DataError(
            f"{store.root}: no {INDEX_NAME} in it: make shards with `megabase prepare "
            "INPUT... OUTPUT`, and give OUTPUT here"
        ) from None
    except StoreError as error:
        raise DataError(f"{path}: {error}") from error
    try:
        file = pq.ParquetFile(source)
        metadata = json.loads(file.schema_arrow.metadata[METADATA_KEY])
        version = int(metadata["version"])
    except (pa.ArrowException, TypeError, KeyError, ValueError) as error:
        raise DataError(f"{path}: not an index of megabase, or damaged: prepare the shards again") from error
    if version > INDEX_VERSION:
        raise DataError(
            f"{path}: written by a newer megabase (index version {version}; this one reads up to "
            f"{INDEX_VERSION}): upgrade megabase or prepare the shards again"
        )
    try:
        # Not with threads: Arrow's may hold on to the bytes until after the interpreter has ended, and abort.
        return metadata, file.read(use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: damaged ({error}): prepare the shards again") from error
