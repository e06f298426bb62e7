"""Writes records into WebDataset shards, and collects the rows of the index that say where they lie.

A shard is a plain tar with two members per record: `00000-000000.seq` holds the bases, one byte each, as the input has
them, and `00000-000000.json` the record's name, description, source and length. The first number of the key is that of
the unit of input, the second that of the record in it, so a key is unique in the whole shard set.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import pyarrow as pa

from megabase.datamodules.alphabet import Alphabet
from megabase.datamodules.errors import DataError
from megabase.datamodules.index.index_file import SCHEMA, RowBatches, segment_row
from megabase.datamodules.index.segments import Segment
from megabase.datamodules.prepare.records import Record
from megabase.datamodules.prepare.sketch import Kmers, Sampler, Sampling
from megabase.datamodules.prepare.tar_writer import TarWriter, size_in_tar

SHARD_BYTES = 256 << 20


@dataclass(frozen=True)
class Part:
    """What the writer of one unit wrote.

    Attributes:
        rows: table of `SCHEMA`, in the order of the records.
        sizes: bytes of every shard by file name, in order.
        sources: names of the input files, in order.
        unlisted: names of the records that have no row.
        bases: of all records.
        kmers: the sampled 31-mers, by the key that the writer was given; None if they were not sampled.
    """

    rows: pa.Table
    sizes: dict[str, int]
    sources: list[str]
    unlisted: list[str]
    bases: int
    kmers: dict[str, Kmers] | None = None


class ShardWriter:
    """Writes the shards `part-UUUUU-SSSSS.tar` of one unit. A context manager: leaving it closes the last shard.

    A new shard begins where one would grow beyond `shard_bytes`. A record is never cut, so a longer one has a larger
    shard of its own. Memory holds one record and the rows.
    """

    def __init__(
        self,
        folder: Path,
        unit: int,
        alphabet: Alphabet,
        shard_bytes: int = SHARD_BYTES,
        sampling: Sampling | None = None,
    ) -> None:
        """
        Args:
            folder: where the shards are written.
            unit: number of the unit.
            alphabet: decides which bases are letters.
            shard_bytes: largest size of a shard that holds more than one record.
            sampling: how 31-mers are sampled; None if they are not.

        Raises:
            DataError: shard_bytes is below 1.
        """
        if shard_bytes < 1:
            raise DataError(f"shard size {shard_bytes} bytes: must be at least 1")
        self._folder = folder
        self._unit = unit
        self._alphabet = alphabet
        self._shard_bytes = shard_bytes
        self._shard: TarWriter | None = None
        self._name = ""
        self._sizes: dict[str, int] = {}
        self._sources: dict[str, None] = {}
        self._unlisted: list[str] = []
        self._records = 0
        self._bases = 0
        self._rows = RowBatches()
        self._sampling = sampling
        self._sampler = Sampler(sampling.scale) if sampling else None

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._shard is not None:
            self._shard.close()

    def write(self, record: Record, segments: Sequence[Segment]) -> None:
        """Append a record, and a row for each of its segments.

        Raises:
            OSError: the shard cannot be written.
        """
        about = {
            "record": record.name,
            "description": record.description,
            "source": record.source,
            "length": len(record.sequence),
        }
        sidecar = json.dumps(about).encode()
        shard = self._shard_for(size_in_tar(len(record.sequence)) + size_in_tar(len(sidecar)))
        key = f"{self._unit:05d}-{self._records:06d}"
        offset = shard.add(f"{key}.seq", record.sequence)
        shard.add(f"{key}.json", sidecar)
        self._records += 1
        self._bases += len(record.sequence)
        self._sources[record.source] = None
        if not segments:
            self._unlisted.append(record.name)
        for segment in segments:
            self._add_row(record, segment, offset)

    def finish(self) -> Part:
        """Wait until the last shard is on disk; returns what was written."""
        self._finish_shard()
        rows = pa.Table.from_batches(self._rows.all(), SCHEMA)
        kmers = self._sampler.finish() if self._sampler else None
        return Part(rows, self._sizes, list(self._sources), self._unlisted, self._bases, kmers)

    def _shard_for(self, size: int) -> TarWriter:
        """The open shard if `size` more bytes fit, else the next one."""
        if self._shard is not None and self._shard.size + size > self._shard_bytes:
            self._finish_shard()
        if self._shard is None:
            self._name = f"part-{self._unit:05d}-{len(self._sizes):05d}.tar"
            self._shard = TarWriter(self._folder / self._name)
        return self._shard

    def _finish_shard(self) -> None:
        if self._shard is None:
            return
        self._shard.finish()
        self._sizes[self._name] = self._shard.size
        self._shard = None

    def _add_row(self, record: Record, segment: Segment, offset: int) -> None:
        bases = memoryview(record.sequence)[segment.start : segment.start + segment.length]
        row = segment_row(
            record.name,
            record.source,
            segment,
            self._name,
            offset + segment.start,
            bases,
            self._alphabet,
        )
        self._rows.add(row)
        if self._sampler is not None and self._sampling is not None:
            self._sampler.add(self._sampling.key(record.name, segment.split), bases, row["gaps"])
