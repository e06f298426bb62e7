"""What `megabase prepare` does: records -> splits -> shards, in parallel, and anew from where it was killed.

The unit of work is an input file, or a run of small ones, so that ten thousand of them are not ten thousand
shards. Each unit has shards of its own, and which files share one depends on their sizes only: the result
is the same, byte for byte, whatever the number of processes and however often it was killed.
"""

import io
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from megabase.datamodules.alphabet import Alphabet
from megabase.datamodules.errors import DataError
from megabase.datamodules.index.index_file import INDEX_VERSION
from megabase.datamodules.index.segments import TRAIN
from megabase.datamodules.index.shard_index import ShardIndex
from megabase.datamodules.prepare.records import Names, check_inputs, expand, read_file
from megabase.datamodules.prepare.splits import Splits
from megabase.datamodules.prepare.unfinished import Unfinished, Unit, digest, states, unfinished
from megabase.datamodules.prepare.workers import Report, checked_jobs, run
from megabase.datamodules.prepare.writer import SHARD_BYTES, Part, ShardWriter
from megabase.datamodules.progress import bar

_UNITS_PER_SHARD = 8
"""Small files share a unit up to this part of a shard: enough units to keep processes busy, few small shards."""


@dataclass(frozen=True)
class _Job:
    """What is done to every unit. folder: where the shards go. field: of a line of JSONL."""

    folder: Path
    alphabet: Alphabet
    splits: Splits
    shard_bytes: int
    field: str


def prepare(
    inputs: Sequence[str | Path],
    output: str | Path,
    alphabet: str = "dna",
    valid: str | float | None = None,
    test: str | float | None = None,
    intervals: str | Path | None = None,
    shard_bytes: int = SHARD_BYTES,
    jobs: int | None = None,
    field: str = "text",
    progress: bool = True,
) -> ShardIndex:
    """Write the records of `inputs` as shards into the new directory `output`; returns them opened.

    inputs: files or globs. valid, test: a fraction in (0, 1), taken from the end of every record, or comma
    separated record names. intervals: a BED file in their place, see `Bed.read`. shard_bytes: size to keep a
    shard below. jobs: processes; None for one per CPU of this process. More than the input has units find
    no work. Memory: one record per process, and the index. field: key of the sequence in a line of JSONL.
    progress: show a bar over the input's bytes on stderr.

    With several processes, a script that calls this needs the usual `if __name__ == "__main__":`.
    Work goes on in OUTPUT.partial and is renamed at the end: nothing of `output` exists unless all of it does.
    Killed, interrupted or failed after a unit was finished, the same call goes on from there.

    Raises DataError for inputs that cannot be read (see `read_file`), for splits that cannot be (see
    `Splits.parse`) or leave nothing to train on, for names met twice, for an output that exists or cannot be
    made, for an OUTPUT.partial of other arguments, of another prepare at work or of inputs that changed
    since, and when a process is killed or the disk is full.
    """
    if "://" in str(output):
        raise DataError(f"{output}: shards are written to a local directory: copy them there afterwards")
    paths, output = expand(inputs), Path(output).absolute()
    splits = Splits.parse(valid, test, intervals)
    letters, jobs = Alphabet.named(alphabet), checked_jobs(jobs)
    check_inputs(paths)
    sizes = [path.stat().st_size for path in paths]
    units = _units(paths, sizes, shard_bytes)
    arguments: dict[str, object] = {
        "INPUT": [str(path.absolute()) for path in paths],
        "--alphabet": alphabet,
        "--valid": str(valid),
        "--test": str(test),
        "--intervals": digest(Path(intervals)) if intervals is not None else None,
        "--field": field,
        "shard_bytes": shard_bytes,
        "version of the index": INDEX_VERSION,
    }
    rule = " and ".join(
        f"{option} {value}" for option, value in (("--valid", valid), ("--test", test)) if value is not None
    )
    with unfinished(output, arguments) as work:
        job = _Job(work.folder, letters, splits, shard_bytes, field)
        kept = work.kept(units)
        try:
            _write(work, units, kept, job, jobs, progress)
            parts = [work.part(unit) for unit in units]
            _check_names(work, units, parts)
        except DataError as error:
            raise work.told(error) from error
        try:
            _check_whole(paths, splits, rule, parts)
        except DataError:
            work.forget(units)  # only other arguments help, and those begin anew
            raise
        try:
            work.publish(output, letters, parts)
        except OSError as error:
            raise work.told(_unwritable(work.folder, error)) from error
    return ShardIndex.open(output)


def _units(paths: Sequence[Path], sizes: Sequence[int], shard_bytes: int) -> list[Unit]:
    """The inputs in their order; neighbours share a unit as long as it stays below a part of a shard."""
    units: list[Unit] = []
    filled = limit = shard_bytes // _UNITS_PER_SHARD
    for number, (path, size) in enumerate(zip(paths, sizes, strict=True)):
        if units and filled + size <= limit:
            units[-1] = Unit(units[-1].number, (*units[-1].paths, path))
            filled += size
        else:
            units.append(Unit(number, (path,)))
            filled = size
    return units


def _write(
    work: Unfinished, units: Sequence[Unit], kept: Sequence[Unit], job: _Job, jobs: int, progress: bool
) -> None:
    """Write the shards of every unit but those that were kept, the largest first."""
    bytes_of = {unit: sum(path.stat().st_size for path in unit.paths) for unit in units}
    waiting = sorted(bytes_of.keys() - set(kept), key=lambda unit: (-bytes_of[unit], unit.number))
    with bar("Preparing", sum(bytes_of.values()), progress) as report:
        report(sum(bytes_of[unit] for unit in kept))
        with closing(run(partial(_write_unit, job, work), waiting, jobs, report)) as done:
            for _ in done:
                pass


def _write_unit(job: _Job, work: Unfinished, unit: Unit, report: Report) -> None:
    inputs, names = states(unit), Names()

    @contextmanager
    def counted(path: Path) -> Iterator[_Counted]:
        with _Counted(path, report) as file:
            yield file

    try:
        with ShardWriter(work.folder, unit.number, job.alphabet, job.shard_bytes) as writer:
            for path in unit.paths:
                for record in read_file(path, job.alphabet, counted, job.field):
                    names.add(record.name, record.source, path)
                    writer.write(record, job.splits.of(record.name, len(record.sequence)))
            part = writer.finish()
        if states(unit) != inputs:
            raise DataError(f"{unit}: changed while it was read: wait until it is written")
        work.finish(unit, inputs, part)
    except OSError as error:
        raise _unwritable(work.folder, error) from error


def _unwritable(folder: Path, error: OSError) -> DataError:
    return DataError(f"{folder}: cannot be written ({error.strerror or error}): make room there")


class _Counted(io.FileIO):
    """A file that reports the bytes read from it."""

    def __init__(self, path: Path, report: Report) -> None:
        super().__init__(path)
        self._report = report

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        self._report(len(data))
        return data

    def readall(self) -> bytes:
        data = super().readall()
        self._report(len(data))
        return data

    def readinto(self, buffer: Any, /) -> int:
        count = super().readinto(buffer)
        self._report(count)
        return count


def _check_names(work: Unfinished, units: Sequence[Unit], parts: Sequence[Part]) -> None:
    """Raise DataError if records of two units have one name; they are then taken as unfinished."""
    names = [
        pa.chunked_array([pc.unique(part.rows["record"]), pa.array(part.unlisted, pa.string())])
        for part in parts
    ]
    total = pa.chunked_array([chunk for column in names for chunk in column.chunks], pa.string())
    if pc.count_distinct(total).as_py() == len(total):
        return
    first: dict[str, Unit] = {}
    for unit, column in zip(units, names, strict=True):
        for name in column.to_pylist():
            if name in first:
                work.forget([first[name], unit])
                raise DataError(
                    f"{unit}: a second record is named {name!r} (the first is in {first[name]}): names tell "
                    "records apart, rename one"
                )
            first[name] = unit


def _check_whole(paths: Sequence[Path], splits: Splits, rule: str, parts: Sequence[Part]) -> None:
    """Raise DataError if a record that the splits name was not met, or nothing is there to train on."""
    met: set[str] = set()
    for part in parts:
        wanted = pa.array(sorted(splits.named), pa.string())
        met.update(pc.unique(part.rows["record"].filter(pc.is_in(part.rows["record"], wanted))).to_pylist())
        met.update(splits.named & set(part.unlisted))
    splits.check_names(met)
    if not any(part.bases for part in parts):
        raise DataError(f"{paths[0]}: the input's records hold no base at all")
    if any(pc.any(pc.equal(part.rows["split"], TRAIN)).as_py() for part in parts):
        return
    if splits.bed:
        raise DataError(f"{splits.bed.path}: no interval is for training: its split must be {TRAIN}")
    what = "name every record" if splits.whole else "take every base"
    raise DataError(f"{rule} {what}: leave one to train on")
