"""OUTPUT.partial: where `prepare` writes until everything is complete, and from where it continues after a kill.

    .lock                 held while a prepare, or a worker that outlives it, is running
    arguments.json        the arguments: only a call with the same ones may continue
    part-UUUUU-SSSSS.tar  shards of unit UUUUU of the input
    part-UUUUU.kmers      the unit's sampled 31-mers, if they are needed
    part-UUUUU.parquet    the unit's manifest, published last: rows of the index, sizes of the shards, and sizes and
                          times of the input files

At the end the shards get consecutive numbers, the index is written, and the directory is renamed to OUTPUT.
"""

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from megabase.datamodules.alphabet import Alphabet
from megabase.datamodules.errors import DataError
from megabase.datamodules.files import FileLock, LockHeldError, sync
from megabase.datamodules.index.index_file import INDEX_NAME, METADATA_KEY, SCHEMA, write_index
from megabase.datamodules.index.leakage import Leakage, write_leakage
from megabase.datamodules.prepare.sketch import Kmers
from megabase.datamodules.prepare.writer import Part

log = logging.getLogger(__name__)

_LOCK, _ARGUMENTS = ".lock", "arguments.json"
_KMERS = ".kmers"
_LOCK_TRIES, _LOCK_WAIT_S = 30, 0.1  # the workers of a killed prepare end a moment after it


@dataclass(frozen=True)
class Unit:
    """Input files that one process reads one after another. number: of the first file among all inputs."""

    number: int
    paths: tuple[Path, ...]

    def __str__(self) -> str:
        return str(self.paths[0]) if len(self.paths) == 1 else f"{self.paths[0]} to {self.paths[-1]}"


@dataclass(frozen=True)
class Manifest:
    """The manifest of a finished unit. inputs: [path, bytes, mtime in ns] of each file. part: what was written."""

    inputs: list[list[str | int]]
    part: Part


class Unfinished:
    """The directory OUTPUT.partial, locked for this process: see `unfinished`."""

    def __init__(self, folder: Path, lock: FileLock, continues: bool) -> None:
        self.folder = folder
        self.lock = lock
        self._continues = continues

    def kept(self, units: Sequence[Unit]) -> list[Unit]:
        """The units that are finished. Files of unfinished ones are removed.

        Raises:
            DataError: an input file of a finished unit has changed since.
        """
        kept, files = [], {_LOCK, _ARGUMENTS}
        wanted = {self._manifest(unit.number): unit for unit in units}
        for path in self._manifests():
            manifest, unit = _read_manifest(path), wanted.get(path)
            if manifest is None or not self._has_shards(manifest):
                continue
            for entry in manifest.inputs:
                if _state(Path(str(entry[0]))) != entry:
                    raise DataError(
                        f"{entry[0]}: has changed since it was prepared into {self.folder}: remove that directory "
                        "to start again"
                    )
            if unit and manifest.inputs == states(unit):  # else the files are grouped differently now
                kept.append(unit)
                files.update((path.name, path.with_suffix(_KMERS).name, *manifest.part.sizes))
        for path in list(self.folder.iterdir()):
            if path.name not in files:
                path.unlink()
        return kept

    def finish(self, unit: Unit, inputs: list[list[str | int]], part: Part) -> None:
        """Publish a unit's manifest, which makes the unit finished."""
        metadata = {
            "inputs": inputs,
            "sizes": part.sizes,
            "sources": part.sources,
            "unlisted": part.unlisted,
            "bases": part.bases,
        }
        path = self._manifest(unit.number)
        if part.kmers is not None:
            _write_kmers(path.with_suffix(_KMERS), part.kmers)
        new = path.with_suffix(".new")
        with new.open("wb") as file:  # pyarrow would read a path with a colon as a URL
            pq.write_table(part.rows.replace_schema_metadata({METADATA_KEY: json.dumps(metadata)}), file)
        sync(new)
        new.rename(path)

    def take_over(self, other: "Unfinished") -> None:
        """Move the finished units of another directory here, the manifest of each last."""
        for path in other._manifests():
            manifest = _read_manifest(path)
            if manifest is None or not other._has_shards(manifest) or (self.folder / path.name).exists():
                continue
            for name in (*manifest.part.sizes, path.with_suffix(_KMERS).name, path.name):
                if (other.folder / name).exists():
                    (other.folder / name).rename(self.folder / name)
        sync(self.folder)

    def forget(self, units: Sequence[Unit]) -> None:
        """Make units unfinished again."""
        for unit in units:
            self._manifest(unit.number).unlink(missing_ok=True)

    def part(self, unit: Unit) -> Part:
        """What a finished unit wrote."""
        path = self._manifest(unit.number)
        manifest = _read_manifest(path)
        assert manifest is not None
        kmers = path.with_suffix(_KMERS)
        return replace(manifest.part, kmers=_read_kmers(kmers) if kmers.exists() else None)

    def can_continue(self) -> bool:
        """Whether another call could use what is finished."""
        return self._continues and bool(self._manifests())

    def resumable(self, error: DataError) -> DataError:
        """The error; if another call can use what is finished, its message adds that the same command continues."""
        if not self.can_continue():
            return error
        return DataError(f"{error}; what is finished stays in {self.folder}, and the same command continues")

    def publish(
        self, output: Path, alphabet: Alphabet, parts: Sequence[Part], leaks: Sequence[Leakage]
    ) -> None:
        """Give the shards consecutive numbers, write index and leakage, and rename the directory to `output`.

        Raises:
            DataError: `output` exists by now; the finished units stay.
            OSError: the directory cannot be written.
        """
        check_output(output)
        names: dict[str, str] = {}
        for part in parts:
            names.update({name: f"shard-{len(names) + at:05d}.tar" for at, name in enumerate(part.sizes)})
        sizes = {names[name]: size for part in parts for name, size in part.sizes.items()}
        sources = list(dict.fromkeys(source for part in parts for source in part.sources))
        batches = [batch for part in parts for batch in _renamed(part.rows, names).to_batches()]
        index = self.folder / INDEX_NAME
        write_index(index, batches, alphabet, sizes, sources)
        sync(index)
        write_leakage(self.folder, leaks)
        for name, new in names.items():
            (self.folder / name).rename(self.folder / new)
        sync(self.folder)
        self.folder.rename(output)
        sync(output.parent)
        for path in (*output.glob("part-*.parquet"), *output.glob(f"part-*{_KMERS}")):
            path.unlink()
        (output / _ARGUMENTS).unlink()
        (output / _LOCK).unlink()

    def _manifest(self, number: int) -> Path:
        return self.folder / f"part-{number:05d}.parquet"

    def _manifests(self) -> list[Path]:
        return sorted(self.folder.glob("part-*.parquet"))

    def _has_shards(self, manifest: Manifest) -> bool:
        sizes = manifest.part.sizes
        paths = {self.folder / name: size for name, size in sizes.items()}
        return all(path.is_file() and path.stat().st_size == size for path, size in paths.items())


@contextmanager
def unfinished(
    output: Path, arguments: dict[str, object], continues: bool = True, folder: Path | None = None
) -> Iterator[Unfinished]:
    """Make OUTPUT.partial, or continue in it. On an exception, it is kept if it holds a finished unit, else removed.

    Args:
        output: the directory that it becomes at the end.
        arguments: what decides the result: option -> JSON value.
        continues: whether another call can continue; False removes the directory on any exception.
        folder: in place of OUTPUT.partial.

    Raises:
        DataError: `output` exists or cannot be made; another prepare uses OUTPUT.partial; it was begun with other
            arguments, or not by prepare.
    """
    folder = folder or output.with_name(output.name + ".partial")
    with _locked(output, folder) as lock:
        work = Unfinished(folder, lock, continues)
        try:
            _check_arguments(folder, arguments)
        except OSError as error:
            raise DataError(f"{folder}: cannot be written ({error.strerror}): make room there") from error
        try:
            yield work
        except BaseException:
            if not work.can_continue():
                shutil.rmtree(folder, ignore_errors=True)
            raise


def states(unit: Unit) -> list[list[str | int]]:
    """[path, bytes, mtime in ns] of each of its files, to notice changes."""
    return [_state(path) for path in unit.paths]


def digest(path: Path) -> str:
    """A checksum of a small file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _state(path: Path) -> list[str | int]:
    try:
        found = path.stat()
    except OSError:
        return [str(path.absolute()), -1, -1]
    return [str(path.absolute()), found.st_size, found.st_mtime_ns]


def _read_manifest(path: Path) -> Manifest | None:
    """A unit's manifest; None if the file is damaged."""
    try:
        rows = pq.read_table(pa.BufferReader(path.read_bytes()), use_threads=False)
        about = json.loads(rows.schema.metadata[METADATA_KEY])
        part = Part(
            rows.replace_schema_metadata(None).cast(SCHEMA),
            about["sizes"],
            about["sources"],
            about["unlisted"],
            about["bases"],
        )
        return Manifest(about["inputs"], part)
    except (pa.ArrowException, OSError, TypeError, KeyError, ValueError):
        return None


def _write_kmers(path: Path, kmers: dict[str, Kmers]) -> None:
    bounds = np.concatenate([[0], np.cumsum([len(each) for each in kmers.values()], dtype=np.int64)])
    lists = pa.LargeListArray.from_arrays(bounds, np.concatenate([np.zeros(0, np.uint64), *kmers.values()]))
    table = pa.table({"key": pa.array(kmers, pa.string()), "kmers": lists})
    new = path.with_suffix(".new")
    with new.open("wb") as file:  # hashes have neither values that recur nor a pattern
        pq.write_table(table, file, use_dictionary=False, compression="none", write_statistics=False)
    sync(new)
    new.rename(path)


def _read_kmers(path: Path) -> dict[str, Kmers]:
    table = pq.read_table(pa.BufferReader(path.read_bytes()), use_threads=False)
    lists = table.column("kmers").combine_chunks()
    values = lists.flatten().to_numpy(zero_copy_only=False)
    bounds = np.cumsum([0, *lists.value_lengths().to_pylist()])
    parts = [values[start:end] for start, end in pairwise(bounds.tolist())]
    return dict(zip(table.column("key").to_pylist(), parts, strict=True))


def _renamed(rows: pa.Table, names: dict[str, str]) -> pa.Table:
    """Rows with the new names of their shards."""
    at = rows.schema.get_field_index("shard")
    shards = rows.column(at).combine_chunks().dictionary_encode()
    new = pa.array([names[name] for name in shards.dictionary.to_pylist()], pa.string())
    return rows.set_column(at, SCHEMA.field("shard"), pc.take(new, shards.indices))


def _locked(output: Path, folder: Path) -> FileLock:
    """Make the directory if it is missing, and lock it."""
    for _ in range(_LOCK_TRIES):
        check_output(output)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock.take(folder / _LOCK, 0o666)
        except LockHeldError:
            time.sleep(_LOCK_WAIT_S)
            continue
        except OSError as error:
            if output.exists():
                continue  # another prepare finished between the two checks
            raise DataError(f"{folder}: cannot be made ({error.strerror}): choose another output") from None
        if lock.is_file(folder / _LOCK):  # else the prepare that held it has finished or given up meanwhile
            if not lock.supported:
                log.warning("%s: its file system has no locks: start no second prepare on it", folder)
            return lock
        lock.close()
        time.sleep(_LOCK_WAIT_S)
    raise DataError(f"{folder}: another prepare is writing it: wait for it, or choose another output")


def check_output(output: Path) -> None:
    """Raise DataError if the directory to make exists."""
    if not output.exists():
        return
    here = Path.cwd()
    shown = output.relative_to(here) if here in output.parents else output
    if output.is_dir():
        raise DataError(f"{shown} already exists: delete it or choose another output")
    raise DataError(f"{shown} is a file: the last argument is the output, a directory to make: add one")


def _check_arguments(folder: Path, arguments: dict[str, object]) -> None:
    """Write the arguments into a new directory; in an existing one, compare them."""
    path = folder / _ARGUMENTS
    if not path.exists():
        if foreign := sorted(
            entry.name for entry in folder.iterdir() if not entry.name.startswith((_LOCK, _ARGUMENTS))
        ):
            raise DataError(
                f"{folder}: exists and holds {foreign[0]}, but no prepare that could continue: remove it"
            )
        new = path.with_name(_ARGUMENTS + ".new")
        new.write_text(json.dumps(arguments))
        sync(new)
        new.rename(path)
        return
    try:
        begun = json.loads(path.read_text())
    except ValueError:
        begun = None
    if not isinstance(begun, dict):
        begun = {}
    if differing := [
        name for name in arguments if begun.get(name) != json.loads(json.dumps(arguments[name]))
    ]:
        raise DataError(
            f"{folder}: was begun with other arguments ({', '.join(differing)}): give the same to continue, or "
            "remove the directory to start again"
        )
