"""`megabase prepare --check`: compares every base and every tar member of a shard set with its index."""

import io
import json
import tarfile
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from megabase.datamodules.errors import DataError
from megabase.datamodules.index.shard_index import ShardIndex
from megabase.datamodules.index.store import Store, StoreError
from megabase.datamodules.prepare.tars import headers
from megabase.datamodules.prepare.workers import Report, checked_jobs, run
from megabase.datamodules.progress import bar

_READ_BYTES = 1 << 20
_SHOWN = 5


def check(output: str | Path, jobs: int | None = None, progress: bool = True) -> int:
    """Read every base in the index of a shard set, and every member of its tars.

    Args:
        output: the directory of the shards, or its URL.
        jobs: processes; None for one per CPU of this process.
        progress: show a bar over the bases on stderr.

    Returns:
        The number of bases that were compared with their checksums.

    Raises:
        DataError: bases differ from their checksum (the message names the first place of every segment); a row of the
            index lies outside the members of its tar, or in another record's; a tar is damaged; or as
            `ShardIndex.open`. The message names shard and record.
    """
    index = ShardIndex.open(output)
    rows = _rows_by_shard(index)
    task = partial(_check_shard, index)
    shards = sorted(index.sizes, key=lambda name: -index.sizes[name])
    with (
        bar("Checking", int(index.segments.length.sum()), progress) as report,
        closing(
            run(task, [(name, rows[name]) for name in shards], checked_jobs(jobs), report, _shard_of)
        ) as done,
    ):
        checked = [result for _, result in done]
    damages = [damage for each in checked for damage in each.damages]
    if len(damages) > 1:
        more = f", {len(damages) - _SHOWN} more" if len(damages) > _SHOWN else ""
        raise DataError(f"{len(damages)} damaged records: {'; '.join(damages[:_SHOWN])}{more}")
    if damages:
        raise DataError(damages[0])
    return sum(each.bases for each in checked)


@dataclass(frozen=True)
class _Checked:
    """Of one shard: bases that match their checksums, and a message for each damaged segment."""

    bases: int
    damages: list[str]


def _rows_by_shard(index: ShardIndex) -> dict[str, NDArray[np.int64]]:
    """The rows of every shard, in order."""
    shards = pa.array(index.segments.shard, pa.string()).dictionary_encode()
    codes = shards.indices.to_numpy(zero_copy_only=False)
    order = np.argsort(codes, kind="stable")
    bounds = np.searchsorted(codes[order], np.arange(len(shards.dictionary) + 1))
    found = {
        name: order[bounds[at] : bounds[at + 1]] for at, name in enumerate(shards.dictionary.to_pylist())
    }
    return {name: found.get(name, order[:0]) for name in index.sizes}


def _shard_of(item: tuple[str, NDArray[np.int64]]) -> str:
    return item[0]


def _check_shard(index: ShardIndex, item: tuple[str, NDArray[np.int64]], report: Report) -> _Checked:
    """Check a shard and its rows."""
    shard, rows = item
    _check_members(index, shard, rows)
    bases, damages = 0, []
    for row in rows.tolist():
        try:
            bases += index.verify_row(row)
        except DataError as error:
            damages.append(str(error))
        report(int(index.segments.length[row]))
    return _Checked(bases, damages)


def _check_members(index: ShardIndex, shard: str, rows: NDArray[np.int64]) -> None:
    """Raise DataError for a row that lies outside the members of the tar, or in another record's."""
    segments, place = index.segments, index.store.name_of(shard)
    members, records = _members(index.store, shard, index.sizes[shard])
    bounds = np.array([(member.start, member.stop) for member in members], np.int64).reshape(-1, 2)
    offsets = segments.offset[rows]
    at = np.searchsorted(bounds[:, 0], offsets, "right") - 1
    inside = at >= 0
    if len(bounds):
        ends = segments.byte_of(rows, segments.length[rows] - 1) + 1
        inside &= ends <= bounds[at, 1]
    for row, number, found in zip(rows.tolist(), at.tolist(), inside.tolist(), strict=True):
        name = segments.record[row]
        if not found:
            raise DataError(
                f"{place}: record {name!r}: does not lie in a member of the tar, where the index says: copy the "
                "shard again, or prepare the shards again"
            )
        key, _, kind = members[number].name.rpartition(".")
        if kind == "seq" and records.get(key, name) != name:
            raise DataError(
                f"{place}: record {name!r}: member {members[number].name} is of record {records[key]!r}: copy index "
                "and shards again, they do not belong together"
            )


@dataclass(frozen=True, slots=True)
class _Member:
    """A file in a tar and its bytes [start, stop)."""

    name: str
    start: int
    stop: int


def _members(store: Store, shard: str, size: int) -> tuple[list[_Member], dict[str, str]]:
    """The files in a tar, and by key the record that its KEY.json names."""
    members, records = [], {}
    try:
        with io.BufferedReader(_StoreFile(store, shard, size), _READ_BYTES) as file:
            for header in headers(file):
                if not header.isfile():
                    continue
                members.append(_Member(header.name, header.offset_data, header.offset_data + header.size))
                if header.name.endswith(".json"):
                    file.seek(header.offset_data)
                    about = _parsed(file.read(header.size))
                    if isinstance(about, dict) and isinstance(about.get("record"), str):
                        records[header.name.removesuffix(".json")] = about["record"]
    except (tarfile.TarError, StoreError, OSError, ValueError) as error:
        raise DataError(
            f"{store.name_of(shard)}: the tar is damaged ({error}): copy the shard again"
        ) from error
    return members, records


class _StoreFile(io.RawIOBase):
    """A file of a store, as a file object."""

    def __init__(self, store: Store, name: str, size: int) -> None:
        self._store, self._name, self._size, self._at = store, name, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def readinto(self, buffer: Any, /) -> int:
        count = max(min(len(buffer), self._size - self._at), 0)
        if count:
            self._store.read_into(self._name, self._at, (memoryview(buffer)[:count],))
        self._at += count
        return count


def _parsed(content: bytes) -> object:
    """The value of a JSON text; None if it is not JSON, since a tar of others may hold any file beside a sequence."""
    with suppress(ValueError, RecursionError):
        return json.loads(content)
    return None
