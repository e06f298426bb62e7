"""index.parquet: one row per segment, and the shards' sizes in its metadata. Writing and reading it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from isal import isal_zlib
from numpy.typing import NDArray

from megabase.datamodules.alphabet import Alphabet
from megabase.datamodules.errors import DataError
from megabase.datamodules.index.segments import Segment, Segments
from megabase.datamodules.index.store import Store, StoreError

INDEX_NAME = "index.parquet"
INDEX_VERSION = 2
METADATA_KEY = b"megabase"

BLOCK_BYTES = 8 << 10
"""Bases under one checksum. A read is verified by reading whole blocks, so it reads little more than was asked for."""

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
_ROWS_PER_BATCH = 4096


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
) -> dict[str, Any]:
    """One row of `SCHEMA`.

    Args:
        record: name of the record.
        source: name of its input file.
        segment: the part of the record.
        shard: file name of the tar.
        offset: byte in the tar of the segment's first base.
        bases: the segment's bases, without line ends.
        alphabet: decides which bases are letters.
        line_bases: bases per line, if there are line ends between the bases in the tar. Lines are counted from the
            record's first base, so a segment may start anywhere in one.
        line_bytes: bytes per line with its line end.
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
        "intervals": [list(interval) for interval in segment.intervals],
    }


class RowBatches:
    """Collects rows of `SCHEMA` in Arrow batches, where a row takes about a hundred bytes."""

    def __init__(self) -> None:
        self._rows: list[dict[str, object]] = []
        self._batches: list[pa.RecordBatch] = []

    def add(self, row: dict[str, object]) -> None:
        """Append a row (see `segment_row`)."""
        self._rows.append(row)
        if len(self._rows) == _ROWS_PER_BATCH:
            self._pack()

    def all(self) -> list[pa.RecordBatch]:
        """Every row that was added."""
        self._pack()
        return self._batches

    def _pack(self) -> None:
        self._batches.append(pa.RecordBatch.from_pylist(self._rows, SCHEMA))
        self._rows = []


@dataclass(frozen=True, eq=False)
class IndexFile:
    """What an index file holds.

    Attributes:
        alphabet: what the shards were prepared for.
        sizes: bytes of every shard, by file name.
        segments: the rows.
    """

    alphabet: Alphabet
    sizes: dict[str, int]
    segments: Segments


def write_index(
    path: Path, batches: list[pa.RecordBatch], alphabet: Alphabet, sizes: dict[str, int], sources: list[str]
) -> None:
    """Write an index file.

    Args:
        path: the file.
        batches: rows of `SCHEMA`.
        alphabet: what the shards were prepared for.
        sizes: bytes of every shard, by file name.
        sources: names of the input files.

    Raises:
        OSError: the file cannot be written.
    """
    metadata = {"version": INDEX_VERSION, "alphabet": alphabet.name, "shards": sizes, "sources": sources}
    schema = SCHEMA.with_metadata({METADATA_KEY: json.dumps(metadata).encode()})
    with path.open("wb") as file:  # pyarrow would read a path with a colon as a URL
        pq.write_table(pa.Table.from_batches(batches, SCHEMA).cast(schema), file)


def read_index(store: Store) -> IndexFile:
    """Read the index of the shards in a store.

    Raises:
        DataError: there is no index, or it is damaged, of another version, or names a shard outside its directory.
    """
    path = store.name_of(INDEX_NAME)
    metadata, table = _metadata_and_rows(path, _content(store))
    sizes: Any = metadata.get("shards")
    _check_shards(path, sizes, table)
    return IndexFile(Alphabet.named(metadata["alphabet"]), sizes, segments_of(table))


def segments_of(table: pa.Table) -> Segments:
    """The columns of a table of `SCHEMA`."""
    plain = [field.name for field in SCHEMA if not pa.types.is_list(field.type)]
    blocks, block_bounds = _flattened(table, "blocks")
    gaps, gap_bounds = _flattened(table, "gaps")
    intervals, interval_bounds = _flattened(table, "intervals")
    return Segments(
        **{name: table.column(name).to_numpy() for name in plain},
        blocks=_numbers(blocks, np.uint32),
        block_bounds=block_bounds,
        gaps=_numbers(gaps.flatten(), np.int64).reshape(-1, 2),
        gap_bounds=gap_bounds,
        intervals=_numbers(intervals.flatten(), np.int64).reshape(-1, 2),
        interval_bounds=interval_bounds,
    )


def _flattened(table: pa.Table, name: str) -> tuple[pa.Array, NDArray[np.int64]]:
    """A column of lists -> their elements in one array, and (rows + 1,) where each row's elements begin."""
    lists = table.column(name).combine_chunks()
    counts = lists.value_lengths().to_numpy(zero_copy_only=False)
    return lists.flatten(), np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


def _numbers(array: pa.Array, kind: type[np.integer]) -> NDArray[Any]:
    return array.to_numpy(zero_copy_only=False).astype(kind)


def _content(store: Store) -> pa.BufferReader:
    try:
        return pa.BufferReader(store.read_whole(INDEX_NAME))
    except FileNotFoundError:
        raise DataError(
            f"{store.root}: no {INDEX_NAME} in it: make shards with `megabase prepare INPUT... OUTPUT`, and give OUTPUT"
            " here"
        ) from None
    except StoreError as error:
        raise DataError(f"{store.name_of(INDEX_NAME)}: {error}") from error


def _metadata_and_rows(path: str, content: pa.BufferReader) -> tuple[dict[str, Any], pa.Table]:
    try:
        file = pq.ParquetFile(content)
        metadata = json.loads(file.schema_arrow.metadata[METADATA_KEY])
        version = int(metadata["version"])
    except (pa.ArrowException, TypeError, KeyError, ValueError) as error:
        raise DataError(f"{path}: not an index of megabase, or damaged: prepare the shards again") from error
    if version != INDEX_VERSION:
        way = (
            "upgrade megabase or prepare the shards again"
            if version > INDEX_VERSION
            else "prepare the shards again"
        )
        raise DataError(
            f"{path}: written by {'a newer' if version > INDEX_VERSION else 'an older'} megabase (index version"
            f" {version}; this one reads {INDEX_VERSION}): {way}"
        )
    try:
        # Arrow's threads may use the bytes until after the interpreter has ended, and then abort: use none.
        return metadata, file.read(use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: damaged ({error}): prepare the shards again") from error


def _check_shards(path: str, sizes: Any, table: pa.Table) -> None:
    """Raise DataError for a shard name that is not a file of the directory: the index may come from anybody."""
    if not isinstance(sizes, dict) or any(type(size) is not int or size < 0 for size in sizes.values()):
        raise DataError(f"{path}: does not hold the sizes of its shards: prepare the shards again")
    for name in sizes:
        if name in ("", ".", "..") or "/" in name or "\0" in name:
            raise DataError(
                f"{path}: names a shard that is not a file of its directory, {name[:80]!r}: do not use it, or prepare"
                " the shards again"
            )
    for name in table.column("shard").unique().to_pylist():
        if name not in sizes:
            raise DataError(
                f"{path}: a record lies in shard {str(name)[:80]!r}, whose size is missing: prepare the shards again"
            )
