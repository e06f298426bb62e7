"""What `megabase prepare --check` does: every base and every tar member of a shard set, against its index."""

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
from megabase.datamodules.prepare.workers import Report, checked_jobs, run
from megabase.datamodules.progress import bar

_READ_BYTES = 1 << 20
_SHOWN = 5


def check(output: str | Path, jobs: int | None = None, progress: bool = True) -> int:
    """Read every base in the index of `output` and every member of its tars; returns the bases verified.

    jobs, progress: as in `prepare`.

    Raises DataError, naming shard and record, for bases that differ from their checksum (the first place of every
    segment), a row of the index
    that does not lie in one member of its tar, or in that of another record, and a tar that is damaged; and
    as `ShardIndex.open`.
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
    """Of a shard: bases verified, and what is wrong with each of its segments that is not as it was."""

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
    """Raise DataError for a row that does not lie in one member of the tar, or in another record's."""
    segments, place = index.segments, index.store.name_of(shard)
    members, records = _members(index.store, shard, index.sizes[shard])
    bounds = np.array([(member.start, member.stop) for member in members], np.int64).reshape(-1, 2)
    offsets = segments.offset[rows]
    at = np.searchsorted(bounds[:, 0], offsets, "right") - 1
    inside = at >= 0
    inside[inside] = (_ends(index, rows) <= bounds[at, 1])[inside] if len(bounds) else False
    for row, number, whole in zip(rows.tolist(), at.tolist(), inside.tolist(), strict=True):
        name = segments.record[row]
        if not whole:
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


def _ends(index: ShardIndex, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """The byte behind the last base of every row, line ends between its bases counted."""
    segments = index.segments
    width = np.maximum(segments.line_bases[rows], 1)
    column = np.where(segments.line_bases[rows] > 0, segments.start[rows] % width, 0)
    lines = (column + segments.length[rows] - 1) // width
    between = np.where(segments.line_bases[rows] > 0, lines * (segments.line_bytes[rows] - width), 0)
    ends: NDArray[np.int64] = segments.offset[rows] + segments.length[rows] + between
    return ends


@dataclass(frozen=True, slots=True)
class _Member:
    """A file in a tar and its bytes [start, stop)."""

    name: str
    start: int
    stop: int


def _members(store: Store, shard: str, size: int) -> tuple[list[_Member], dict[str, str]]:
    """The files in a tar, and the record that KEY.json names, by key."""
    members, records = [], {}
    try:
        with (
            io.BufferedReader(_StoreFile(store, shard, size), _READ_BYTES) as file,
            tarfile.open(fileobj=file, mode="r:") as tar,
        ):
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # else it keeps them all
                if not member.isfile():
                    continue
                members.append(_Member(member.name, member.offset_data, member.offset_data + member.size))
                if member.name.endswith(".json"):
                    file.seek(member.offset_data)
                    about = _parsed(file.read(member.size))
                    if isinstance(about, dict) and isinstance(about.get("record"), str):
                        records[member.name.removesuffix(".json")] = about["record"]
    except (tarfile.TarError, StoreError, OSError, ValueError) as error:
        raise DataError(
            f"{store.name_of(shard)}: the tar is damaged ({error}): copy the shard again"
        ) from error
    return members, records


class _StoreFile(io.RawIOBase):
    """A file of a store as Python's own."""

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
    """What JSON says; None for what is none: a tar of others may hold any file beside a sequence."""
    with suppress(ValueError, RecursionError):
        return json.loads(content)
    return None
