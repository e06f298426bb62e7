"""Write records into WebDataset shards and their index; publish the whole by one rename.

A shard is a plain tar: `000000.seq` (bases as they are, one byte each) and `000000.json` per record. Member
headers are constant but for name and size, so the same input gives the same bytes. All is written into
`OUTPUT.partial`, flushed to disk, and renamed: whoever sees OUTPUT sees all of it.
"""

import json
import os
import shutil
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
import pyarrow as pa

from datamodules.alphabet import Alphabet
from datamodules.errors import DataError
from datamodules.index import INDEX_NAME, SCHEMA, write_index
from datamodules.records import Record
from datamodules.splits import Segment

SHARD_BYTES = 256 << 20
_ROWS_PER_BATCH = 4096


class ShardWriter:
    """Context manager that writes `output`: leaving it publishes, an exception removes what was written.

    output: directory to make. shard_bytes: a new shard begins where one would grow beyond this; a record is
    never cut, so a longer one has a larger shard of its own. Memory holds one record and the index.

    Raises DataError if `output` exists, or if `OUTPUT.partial` does (another writer, or one that was killed).
    """

    def __init__(self, output: Path, alphabet: Alphabet, shard_bytes: int = SHARD_BYTES) -> None:
        if shard_bytes < 1:
            raise DataError(f"shard size {shard_bytes} bytes: must be at least 1")
        self.output = output
        self.partial = output.with_name(output.name + ".partial")
        self._alphabet = alphabet
        self._shard_bytes = shard_bytes
        self._shard: BinaryIO | None = None
        self._sizes: dict[str, int] = {}
        self._sources: dict[str, None] = {}
        self._members = 0
        self._published = False
        self._rows: list[dict[str, object]] = []
        self._batches: list[pa.RecordBatch] = []

    def __enter__(self) -> "ShardWriter":
        if self.output.exists():
            what = "exists already" if self.output.is_dir() else "is a file, and OUTPUT a directory to make"
            raise DataError(
                f"{self.output}: {what}: the last argument must be a new directory for the shards"
            )
        try:
            self.output.parent.mkdir(parents=True, exist_ok=True)
            self.partial.mkdir()
        except FileExistsError:
            raise DataError(
                f"{self.partial}: exists: another prepare writes it or was killed; if none runs, remove it"
            ) from None
        except OSError as error:
            raise DataError(
                f"{self.partial}: cannot be made ({error.strerror}): choose another output"
            ) from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._publish()
        finally:
            if self._shard is not None:
                self._shard.close()
            if not self._published:
                shutil.rmtree(self.partial, ignore_errors=True)

    def write(self, record: Record, segments: Sequence[Segment]) -> None:
        """Append a record; `segments` are the parts of it that go into the index."""
        about = {
            "record": record.name,
            "description": record.description,
            "source": record.source,
            "length": len(record.sequence),
        }
        sidecar = json.dumps(about).encode()
        shard = self._shard_for(_blocks(len(record.sequence)) + _blocks(len(sidecar)))
        key = f"{self._members:06d}"
        offset = _add_member(shard, f"{key}.seq", record.sequence)
        _add_member(shard, f"{key}.json", sidecar)
        self._members += 1
        self._sources[record.source] = None
        for segment in segments:
            self._add_row(record, segment, offset)

    def _shard_for(self, size: int) -> BinaryIO:
        """The open shard if `size` more bytes fit, else the next one."""
        if self._shard is not None and self._shard.tell() + size + tarfile.BLOCKSIZE * 2 > self._shard_bytes:
            self._finish_shard()
        if self._shard is None:
            self._shard = (self.partial / f"shard-{len(self._sizes):05d}.tar").open("wb")
        return self._shard

    def _finish_shard(self) -> None:
        if self._shard is None:
            return
        self._shard.write(bytes(tarfile.BLOCKSIZE * 2))  # two empty blocks end a tar
        self._shard.flush()
        os.fsync(self._shard.fileno())
        self._sizes[Path(self._shard.name).name] = self._shard.tell()
        self._shard.close()
        self._shard = None

    def _add_row(self, record: Record, segment: Segment, offset: int) -> None:
        part = memoryview(record.sequence)[segment.start : segment.start + segment.length]
        self._rows.append(
            {
                "record": record.name,
                "split": segment.split,
                "start": segment.start,
                "length": segment.length,
                "shard": f"shard-{len(self._sizes):05d}.tar",
                "offset": offset + segment.start,
                "crc32": zlib.crc32(part),
                "gaps": self._alphabet.gaps(np.frombuffer(part, np.uint8)).tolist(),
            }
        )
        if len(self._rows) == _ROWS_PER_BATCH:
            self._pack_rows()

    def _pack_rows(self) -> None:
        """Python objects to Arrow, which holds a row in about a hundred bytes."""
        self._batches.append(pa.RecordBatch.from_pylist(self._rows, SCHEMA))
        self._rows = []

    def _publish(self) -> None:
        self._finish_shard()
        self._pack_rows()
        index = self.partial / INDEX_NAME
        write_index(index, self._batches, self._alphabet, self._sizes, list(self._sources))
        _fsync(index)
        _fsync(self.partial)
        self.partial.rename(self.output)
        self._published = True
        _fsync(self.output.parent)


def _blocks(size: int) -> int:
    """Bytes that a member of `size` bytes takes in a tar: header and padded content."""
    return tarfile.BLOCKSIZE * (1 + -(-size // tarfile.BLOCKSIZE))


def _add_member(file: BinaryIO, name: str, content: bytes) -> int:
    """Append a tar member and return the offset of its content. (`tarfile` would keep a list of members.)"""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    file.write(info.tobuf(tarfile.GNU_FORMAT))
    offset = file.tell()
    file.write(content)
    file.write(bytes(-len(content) % tarfile.BLOCKSIZE))
    return offset


def _fsync(path: Path) -> None:
    """Flush a file, or a directory's entries, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
