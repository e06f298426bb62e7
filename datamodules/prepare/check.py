"""`megabase prepare --check`: compares every base and tar member of a shard set with its index, and lists damage."""

import io
import json
import tarfile
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from megabase.datamodules.errors import DataError
from megabase.datamodules.index.index_file import BLOCK_BYTES
from megabase.datamodules.index.shard_index import ShardIndex
from megabase.datamodules.index.store import Store, StoreError
from megabase.datamodules.prepare.tars import headers
from megabase.datamodules.prepare.workers import Report, checked_jobs, run
from megabase.datamodules.progress import bar

_READ_BYTES = 1 << 20


class Damage(NamedTuple):
    """A segment, or a whole shard, that is not what the index says.

    Attributes:
        shard: file name of the tar.
        record, split: of the segment; empty for a whole shard.
        start, end: bases of the record from the first to the last damaged one, to whole checksum blocks; 0 for a shard.
        problem: what was found.
    """

    shard: str
    record: str
    split: str
    start: int
    end: int
    problem: str


class DamageError(DataError):
    """Shards are damaged. damages: all that was found, by shard and record."""

    def __init__(self, output: str | Path, index: ShardIndex, damages: list[Damage]) -> None:
        segments = {(damage.record, damage.split) for damage in damages if damage.record}
        shards = {damage.shard for damage in damages}
        parts = f"{len(segments):,} of {len(index.segments):,} segments, " if segments else ""
        super().__init__(
            f"{output}: damage in {parts}{len(shards):,} of {len(index.sizes):,} shards: copy "
            f"{'this shard' if len(shards) == 1 else 'these shards'} again, or prepare all of them again"
        )
        self.damages = damages


def check(output: str | Path, jobs: int | None = None, progress: bool = True) -> int:
    """Read every base in the index of a shard set, and every member of its tars.

    Args:
        output: the directory of the shards, or its URL.
        jobs: processes; None for one per CPU of this process.
        progress: show a bar over the bases on stderr.

    Returns:
        The number of bases that were compared with their checksums.

    Raises:
        DamageError: bases differ from their checksum or cannot be read; a row of the index lies outside the members of
            its tar, or in another record's; a tar is damaged.
        DataError: as `ShardIndex.open`.
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
    if damages := sorted(damage for each in checked for damage in each.damages):
        raise DamageError(output, index, damages)
    return sum(each.bases for each in checked)


@dataclass(frozen=True)
class _Checked:
    """Of one shard: bases that match their checksums, and its damages."""

    bases: int
    damages: list[Damage]


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
    bases, damages = 0, []
    try:
        misplaced = _check_members(index, shard, rows)
    except (tarfile.TarError, StoreError, OSError, ValueError) as error:
        misplaced = {}
        damages.append(Damage(shard, "", "", 0, 0, f"the tar is damaged ({error})"))
    for row in rows.tolist():
        length = int(index.segments.length[row])
        if damage := misplaced.get(row) or _check_bases(index, row):
            damages.append(damage)
        else:
            bases += length
        report(length)
    return _Checked(bases, damages)


def _check_bases(index: ShardIndex, row: int) -> Damage | None:
    """Compare a segment with its checksums; names all of its damaged blocks."""
    segments = index.segments
    total, first = int(segments.length[row]), int(segments.start[row])
    try:
        index.verify_row(row)
        return None
    except DataError as error:
        cause = error.__cause__
    bad = []
    for block in range(0, total, BLOCK_BYTES):
        try:
            index.read(row, block, min(BLOCK_BYTES, total - block))
        except DataError:
            bad.append(block)
    start, end = (bad[0], min(bad[-1] + BLOCK_BYTES, total)) if bad else (0, total)
    count = f" ({len(bad):,} blocks of {BLOCK_BYTES >> 10} KiB)" if len(bad) > 1 else ""
    problem = str(cause) if isinstance(cause, StoreError) else f"differs from its checksum{count}"
    return _damage(index, row, problem, first + start, first + end)


def _damage(index: ShardIndex, row: int, problem: str, start: int, end: int) -> Damage:
    segments = index.segments
    return Damage(segments.shard[row], segments.record[row], segments.split[row], start, end, problem)


def _check_members(index: ShardIndex, shard: str, rows: NDArray[np.int64]) -> dict[int, Damage]:
    """The rows that lie outside the members of the tar, or in another record's. Raises as `_members`."""
    segments = index.segments
    members, records = _members(index.store, shard, index.sizes[shard])
    bounds = np.array([(member.start, member.stop) for member in members], np.int64).reshape(-1, 2)
    offsets = segments.offset[rows]
    at = np.searchsorted(bounds[:, 0], offsets, "right") - 1
    inside = at >= 0
    if len(bounds):
        ends = segments.byte_of(rows, segments.length[rows] - 1) + 1
        inside &= ends <= bounds[at, 1]
    damages = {}
    for row, number, found in zip(rows.tolist(), at.tolist(), inside.tolist(), strict=True):
        start = int(segments.start[row])
        place = start, start + int(segments.length[row])
        if not found:
            damages[row] = _damage(index, row, "not in a member of the tar, where the index says", *place)
            continue
        key, _, kind = members[number].name.rpartition(".")
        other = records.get(key, segments.record[row])
        if kind == "seq" and other != segments.record[row]:
            damages[row] = _damage(index, row, f"here the shard has record {other!r}", *place)
    return damages


@dataclass(frozen=True, slots=True)
class _Member:
    """A file in a tar and its bytes [start, stop)."""

    name: str
    start: int
    stop: int


def _members(store: Store, shard: str, size: int) -> tuple[list[_Member], dict[str, str]]:
    """The files in a tar, and by key the record that its KEY.json names. Raises an error of tarfile or the store."""
    members, records = [], {}
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
