"""Reads bases of prepared shards: the index, and a store of the tars' bytes (a local directory, or a URL).

A read fetches the bases asked for, rounded up to whole checksum blocks, and compares every block with its checksum
each time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from isal import isal_zlib
from numpy.typing import NDArray

from megabase.datamodules.alphabet import Alphabet
from megabase.datamodules.errors import DataError
from megabase.datamodules.index.index_file import BLOCK_BYTES, read_index
from megabase.datamodules.index.lines import without_line_ends
from megabase.datamodules.index.segments import Segments
from megabase.datamodules.index.store import Buffer, Store, StoreError, open_store

_VERIFY_BYTES = 512 * BLOCK_BYTES


@dataclass(eq=False)
class ShardIndex:
    """An opened shard set.

    A copy sent to another process opens files and connections of its own.

    Attributes:
        directory: where index and shards lie, a path or a URL.
        alphabet: what the shards were prepared for.
        sizes: bytes of every shard, by file name.
        segments: the rows of the index.
        store: reads the bytes.
    """

    directory: Path | str
    alphabet: Alphabet
    sizes: dict[str, int]
    segments: Segments
    store: Store

    @classmethod
    def open(cls, directory: str | Path) -> "ShardIndex":
        """Open the shards in a directory, and check that all of them exist and have the size that the index says.

        Args:
            directory: a path, or any URL that fsspec opens.

        Raises:
            DataError: the directory or its index does not exist; the index is damaged, of another version, or names a
                shard outside the directory; a shard is missing or has another size; the URL cannot be read, or its
                server does not serve ranges of bytes.
        """
        store = open_store(directory)
        file = read_index(store)
        store.check(file.sizes)
        return cls(store.root, file.alphabet, file.sizes, file.segments, store)

    def read(self, row: int, start: int, length: int) -> NDArray[np.uint8]:
        """Bases [start, start + length) of a row's segment, (length,) uint8. Raises as `read_into`."""
        if length < 0:
            raise self._outside(row, start, length)
        out = np.empty(length, np.uint8)
        self.read_into(row, start, out)
        return out

    def read_into(self, row: int, start: int, out: NDArray[np.uint8]) -> None:
        """Fill `out` with the bases of a row's segment from `start` on.

        Args:
            row: row of the index.
            start: first base, counted in the segment.
            out: contiguous (length,) uint8.

        Raises:
            IndexError: the range reaches outside the segment.
            DataError: the bytes cannot be read, are missing, or differ from their checksum in two reads; the message
                names shard and record.
        """
        segments, start = self.segments, int(start)
        end, total = start + len(out), segments.length.item(row)
        if start < 0 or end > total:
            raise self._outside(row, start, len(out))
        if start == end:
            return
        blocks = segments.block_bounds.item(row)
        low = start - start % BLOCK_BYTES
        high = min(end + -end % BLOCK_BYTES, total)
        parts = bytearray(start - low), out.data, bytearray(high - end)
        for last in (False, True):
            self._fetch(row, low, parts)
            bad = self._first_bad_block(blocks, low // BLOCK_BYTES, parts)
            if bad is None:
                return
            if last:
                raise DataError(self._damage(row, bad))

    def verify_row(self, row: int) -> int:
        """Read a segment, compare it with its checksums, and return its number of bases. Raises as `read_into`."""
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
        """Fill `parts`, one after another, with the segment's bases from `low` on."""
        segments, shard = self.segments, self.segments.shard[row]
        line_bases = segments.line_bases.item(row)
        try:
            if not line_bases:
                self.store.read_into(shard, segments.offset.item(row) + low, parts)
                return
            high = low + sum(map(len, parts))
            first, last = segments.byte_of(np.array([row, row]), np.array([low, high - 1])).tolist()
            span = np.empty(last + 1 - first, np.uint8)
            self.store.read_into(shard, first, (span.data,))
        except StoreError as error:
            raise DataError(
                f"{self._place(row)}: {error}, or leave such windows out with data.on_error: skip"
            ) from error
        column = (segments.start.item(row) + low) % line_bases
        bases = memoryview(without_line_ends(span, column, line_bases, segments.line_bytes.item(row)))
        for part in parts:
            part[:], bases = bases[: len(part)], bases[len(part) :]

    def _first_bad_block(self, blocks: int, block: int, parts: Sequence[Buffer]) -> int | None:
        """The number, within its segment, of the first block that differs from its checksum; None if none does.

        Args:
            blocks: where the segment's checksums begin in `segments.blocks`.
            block: the number, within the segment, of the block that `parts` begin with.
            parts: the bases of whole blocks, cut before and after the bases that were asked for.
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
