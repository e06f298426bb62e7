"""Write records into WebDataset shards, and the rows of the index that say where they lie.

A shard is a plain tar: `00000-000000.seq` (bases as they are, one byte each) and `00000-000000.json` per record.
The key holds the number of the unit of input and that of the record in it, so it is the record's own in the
whole set. Member headers are constant but for name and size, so the same input gives the same bytes.
"""

import json
import os
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import pyarrow as pa

from megabase.datamodules.alphabet import Alphabet
from megabase.datamodules.errors import DataError
from megabase.datamodules.index.index_file import SCHEMA, RowBatches, segment_row
from megabase.datamodules.index.segments import Segment
from megabase.datamodules.prepare.records import Record

SHARD_BYTES = 256 << 20
_BLOCK = tarfile.BLOCKSIZE
_END = bytes(2 * _BLOCK)
_LARGEST = 8 << 30
"""Bytes from which on a member's size is no longer written in octal digits."""

_TEMPLATE = tarfile.TarInfo().tobuf(tarfile.GNU_FORMAT)
_TEMPLATE_SUM = sum(_TEMPLATE) - sum(_TEMPLATE[124:135]) - sum(_TEMPLATE[148:156]) + 8 * ord(" ")


@dataclass(frozen=True)
class Part:
    """What the writer of one unit wrote.

    rows: table of `SCHEMA`, in the order of the records. sizes: bytes of every shard by file name, in order.
    sources: names of the input files, in order. unlisted: names of the records that have no row.
    bases: of all records.
    """

    rows: pa.Table
    sizes: dict[str, int]
    sources: list[str]
    unlisted: list[str]
    bases: int


class ShardWriter:
    """Writes the shards `part-UUUUU-SSSSS.tar` of unit `unit` into `folder`; a context manager, to close them.

    shard_bytes: a new shard begins where one would grow beyond this; a record is never cut, so a longer one
    has a larger shard of its own. Memory holds one record and the index.
    """

    def __init__(self, folder: Path, unit: int, alphabet: Alphabet, shard_bytes: int = SHARD_BYTES) -> None:
        if shard_bytes < 1:
            raise DataError(f"shard size {shard_bytes} bytes: must be at least 1")
        self._folder = folder
        self._unit = unit
        self._alphabet = alphabet
        self._shard_bytes = shard_bytes
        self._shard: BinaryIO | None = None
        self._name = ""
        self._size = 0
        self._sizes: dict[str, int] = {}
        self._sources: dict[str, None] = {}
        self._unlisted: list[str] = []
        self._members = 0
        self._bases = 0
        self._rows = RowBatches()

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._shard is not None:
            self._shard.close()

    def write(self, record: Record, segments: Sequence[Segment]) -> None:
        """Append a record; `segments` are the parts of it that go into the index."""
        about = {
            "record": record.name,
            "description": record.description,
            "source": record.source,
            "length": len(record.sequence),
        }
        sidecar = json.dumps(about).encode()
        size = _in_tar(len(record.sequence)) + _in_tar(len(sidecar))
        shard = self._shard_for(size)
        key = f"{self._unit:05d}-{self._members:06d}"
        offset = self._size + _BLOCK
        shard.writelines((*_member(f"{key}.seq", record.sequence), *_member(f"{key}.json", sidecar)))
        self._size += size
        self._members += 1
        self._bases += len(record.sequence)
        self._sources[record.source] = None
        if not segments:
            self._unlisted.append(record.name)
        for segment in segments:
            self._add_row(record, segment, offset)

    def finish(self) -> Part:
        """Bring the last shard to the disk; what was written."""
        self._finish_shard()
        rows = pa.Table.from_batches(self._rows.all(), SCHEMA)
        return Part(rows, self._sizes, list(self._sources), self._unlisted, self._bases)

    def _shard_for(self, size: int) -> BinaryIO:
        """The open shard if `size` more bytes fit, else the next one."""
        if self._shard is not None and self._size + size + len(_END) > self._shard_bytes:
            self._finish_shard()
        if self._shard is None:
            self._name = f"part-{self._unit:05d}-{len(self._sizes):05d}.tar"
            self._shard = (self._folder / self._name).open("wb")
            self._size = 0
        return self._shard

    def _finish_shard(self) -> None:
        if self._shard is None:
            return
        self._shard.write(_END)
        self._shard.flush()
        os.fsync(self._shard.fileno())
        self._sizes[self._name] = self._shard.tell()
        self._shard.close()
        self._shard = None

    def _add_row(self, record: Record, segment: Segment, offset: int) -> None:
        row = segment_row(
            record.name,
            record.source,
            segment,
            self._name,
            offset + segment.start,
            memoryview(record.sequence)[segment.start : segment.start + segment.length],
            self._alphabet,
        )
        self._rows.add(row)


def _in_tar(size: int) -> int:
    """Bytes that a member of `size` bytes takes in a tar: header and padded content."""
    return _BLOCK * (1 + -(-size // _BLOCK))


def _member(name: str, content: bytes) -> tuple[bytes, bytes, bytes]:
    """Header, content and padding of a tar member."""
    return _header(name, len(content)), content, _END[: -len(content) % _BLOCK]


def _header(name: str, size: int) -> bytes:
    """The header of a member with a short ASCII name, as `tarfile` makes it, but ten times as fast.

    Only name, size and checksum differ from one member to the next (POSIX ustar: bytes 0 to 99, 124 to 135
    and 148 to 155; the checksum is the sum of all bytes, its own counted as spaces).
    """
    if size >= _LARGEST:
        info = tarfile.TarInfo(name)
        info.size = size
        return info.tobuf(tarfile.GNU_FORMAT)
    label, digits = name.encode("ascii"), b"%011o" % size
    total = _TEMPLATE_SUM + sum(label) + sum(digits)
    return b"".join(
        (
            label.ljust(100, b"\0"),
            _TEMPLATE[100:124],
            digits,
            _TEMPLATE[135:148],
            b"%06o" % total,
            _TEMPLATE[154:],
        )
    )
