"""`megabase prepare`: files -> records -> splits -> shards, in parallel; after a kill the same call continues.

The unit of work is an input file, or several small ones in a row, so that ten thousand files do not become ten
thousand shards. Each unit has its own shards, and which files share a unit depends on their sizes only. So the result
is the same, byte for byte, whatever the number of processes and however often they were killed.
"""

import io
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from megabase.datamodules.errors import DataError
from megabase.datamodules.index.segments import TRAIN
from megabase.datamodules.index.shard_index import ShardIndex
from megabase.datamodules.prepare.call import Job, begun, checked
from megabase.datamodules.prepare.inputs import is_pipe, prefixed
from megabase.datamodules.prepare.leaks import leaks_of, warn
from megabase.datamodules.prepare.portions import Portion, remove, take_over
from megabase.datamodules.prepare.records import Names, read_file, second_record, told_apart
from megabase.datamodules.prepare.relatives import split_by_similarity
from megabase.datamodules.prepare.splits import END, RECORD, SIMILARITY, Splits, draw, warn_of_shares
from megabase.datamodules.prepare.unfinished import Unfinished, Unit, states
from megabase.datamodules.prepare.workers import Report, checked_jobs, run
from megabase.datamodules.prepare.writer import SHARD_BYTES, Part, ShardWriter
from megabase.datamodules.progress import bar


def prepare(
    inputs: Sequence[str | Path],
    output: str | Path,
    alphabet: str = "dna",
    valid: str | float | None = None,
    test: str | float | None = None,
    intervals: str | Path | None = None,
    split_by: str = END,
    similarity: float | None = None,
    shard_bytes: int = SHARD_BYTES,
    jobs: int | None = None,
    field: str = "text",
    allow_other: bool = False,
    prefix_names: bool = False,
    progress: bool = True,
) -> ShardIndex:
    """Write the records of files as shards into a new directory, and open them.

    The shards are written into OUTPUT.partial, which is renamed at the end: `output` is complete or does not exist. If
    the call is killed, interrupted or fails after a unit was finished, the same call continues from there. With several
    processes, a script that calls this needs the usual `if __name__ == "__main__":`. Memory: one record per
    process, and the index. Long because it documents every option.

    Args:
        inputs: files, directories, globs or pipes, see `expand`. A pipe is copied to a file beside the output first; a
            call with one does not continue after a kill.
        output: the directory to make.
        alphabet: "dna", "protein" or "bytes".
        valid, test: a fraction in (0, 1), or comma separated record names and patterns of them.
        intervals: a BED file in place of the two, see `Bed.read`.
        split_by: "end" takes a fraction from the end of every record, "record" whole records, see `draw`, "similarity"
            whole groups of similar records, see `relatives`.
        similarity: of records of different groups, the smaller shares at most this fraction of its 31-mers; None: 0.1.
        shard_bytes: largest size of a shard, unless a single record is larger.
        jobs: processes; None for one per CPU of this process. Jobs beyond the number of units are not used.
        field: key of the sequence in a line of JSONL.
        allow_other: accept files that are RNA, DNA for protein, or mostly N: see `Composition.check`.
        prefix_names: put a name for its file before each record's name, see `prefixes`.
        progress: show a bar over the input's bytes on stderr.

    Raises:
        DataError: an input cannot be read (see `read_file`); the splits are impossible (see `Splits.parse`) or leave
            nothing to train on; a name occurs twice; the output exists or cannot be made; OUTPUT.partial was begun with
            other arguments, is used by another prepare, or its inputs have changed; a worker was killed; the disk is
            full.
    """
    call = checked(
        inputs,
        output,
        alphabet=alphabet,
        valid=valid,
        test=test,
        intervals=intervals,
        split_by=split_by,
        similarity=similarity,
        shard_bytes=shard_bytes,
        field=field,
        allow_other=allow_other,
        prefix_names=prefix_names,
    )
    jobs = checked_jobs(jobs)
    with begun(call, None) as (work, job, units):
        take_over(work, call.output, call.arguments)
        parts = _written(work, units, job, jobs, progress)
        try:
            if call.splits.by == SIMILARITY:
                parts = split_by_similarity(parts, call.splits.fractions, call.threshold)
            _check_complete(call.paths, call.splits, call.rule, parts)
        except DataError:
            work.forget(units)  # this needs other arguments, which start from the beginning
            raise
        leaks = leaks_of([part.kmers for part in parts if part.kmers is not None])
        try:
            work.publish(call.output, job.alphabet, parts, leaks)
        except OSError as error:
            raise work.resumable(_unwritable(work.folder, error)) from error
    remove(call.output)
    warn(leaks)
    return ShardIndex.open(call.output)


def prepare_portion(
    inputs: Sequence[str | Path],
    output: str | Path,
    portion: str,
    jobs: int | None = None,
    progress: bool = True,
    **options: Any,
) -> int:
    """Write one portion of the units of an output; `prepare` with the same arguments publishes all of them.

    Args:
        inputs, output, jobs, progress: as for `prepare`, the same for all portions. No input may be a pipe.
        portion: "K/N": the K-th of N.
        options: further ones of `prepare`.

    Returns:
        How many input files the portion has. 0: there are fewer units than portions.

    Raises:
        DataError: as `prepare`; or `portion` is not K/N, or an input is a pipe.
    """
    mine, jobs = Portion.parse(portion), checked_jobs(jobs)
    call = checked(inputs, output, **options)
    if pipes := [path for path in call.paths if is_pipe(path)]:
        raise DataError(
            f"--portion {portion}: {pipes[0]} is a pipe, which only one of the calls could read: write a file"
        )
    with begun(call, mine.folder(call.output)) as (work, job, units):
        own = mine.units(units, [sum(path.stat().st_size for path in unit.paths) for unit in units])
        _written(work, own, job, jobs, progress)
    return sum(len(unit.paths) for unit in own)


def _written(work: Unfinished, units: Sequence[Unit], job: Job, jobs: int, progress: bool) -> list[Part]:
    """Write the units that are not finished yet; returns what all units hold."""
    kept = work.kept(units)
    try:
        _write(work, units, kept, job, jobs, progress)
        parts = [work.part(unit) for unit in units]
        _check_names(work, units, parts)
    except DataError as error:
        raise work.resumable(error) from error
    return parts


def _write(
    work: Unfinished, units: Sequence[Unit], kept: Sequence[Unit], job: Job, jobs: int, progress: bool
) -> None:
    """Write the shards of every unit but those that are kept, the largest unit first."""
    bytes_of = {unit: sum(path.stat().st_size for path in unit.paths) for unit in units}
    waiting = sorted(bytes_of.keys() - set(kept), key=lambda unit: (-bytes_of[unit], unit.number))
    with bar("Preparing", sum(bytes_of.values()), progress) as report:
        report(sum(bytes_of[unit] for unit in kept))
        with closing(run(partial(_write_unit, job, work), waiting, jobs, report)) as done:
            for _ in done:
                pass


def _write_unit(job: Job, work: Unfinished, unit: Unit, report: Report) -> None:
    """Write the shards and the manifest of a unit; runs in a worker."""
    inputs, names = states(unit), Names()

    @contextmanager
    def counted(path: Path) -> Iterator[_Counted]:
        with _Counted(path, report) as file:
            yield file

    try:
        with ShardWriter(work.folder, unit.number, job.alphabet, job.shard_bytes, job.sampling) as writer:
            for path in unit.paths:
                for record in read_file(path, job.alphabet, counted, job.field, job.allow_other):
                    if job.prefixes:
                        record = replace(record, name=prefixed(job.prefixes[path], path, record.name))
                    names.add(record.name, str(path), str(path))
                    drawn = partial(draw, record.sequence, job.alphabet)
                    writer.write(record, job.splits.of(record.name, len(record.sequence), drawn))
            part = writer.finish()
        if states(unit) != inputs:
            raise DataError(f"{unit}: changed while it was read: wait until it is complete")
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
    """Raise DataError if records of two units have the same name; all units then count as unfinished.

    The way out may be another argument, with which none of them could be continued.
    """
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
                work.forget(units)
                raise second_record(name, str(first[name]), str(unit), told_apart("", str(unit)))
            first[name] = unit


def _names(parts: Sequence[Part]) -> list[str]:
    """The names of all records, in order."""
    return list(
        dict.fromkeys(name for part in parts for name in (*part.rows["record"].to_pylist(), *part.unlisted))
    )


def _check_complete(paths: Sequence[Path], splits: Splits, rule: str, parts: Sequence[Part]) -> None:
    """Raise DataError if a record that the splits name does not exist, or nothing is left to train on."""
    found: set[str] = set()
    for part in parts:
        wanted = pa.array(sorted(splits.named), pa.string())
        found.update(pc.unique(part.rows["record"].filter(pc.is_in(part.rows["record"], wanted))).to_pylist())
        found.update(splits.named & set(part.unlisted))
    splits.check_names(found, lambda: _names(parts))
    if not any(part.bases for part in parts):
        raise DataError(f"{paths[0]}: the input's records hold no base at all")
    present = {split for part in parts for split in pc.unique(part.rows["split"]).to_pylist()}
    if splits.by != END and (empty := {TRAIN, *splits.fractions} - present):
        raise DataError(
            f"--split-by {splits.by} gives no record to {' or '.join(sorted(empty))}: there are too few records for "
            f"{rule}: name them, or take a fraction of every record with --split-by {END}"
        )
    if empty := set(splits.fractions) - present:
        raise DataError(
            f"{rule} takes no base of any record for {' and '.join(sorted(empty))}: every record is too short for so"
            " small a fraction: take a larger one, or whole records with --split-by record"
        )
    if splits.by == RECORD:
        rows = [part.rows for part in parts]
        sizes = {
            split: sum(
                pc.sum(each["length"].filter(pc.equal(each["split"], split))).as_py() or 0 for each in rows
            )
            for split in present
        }
        warn_of_shares(splits.fractions, sizes, "records are drawn whole")
    if TRAIN not in present:
        if splits.bed:
            raise DataError(f"{splits.bed.path}: no interval is for training: its split must be {TRAIN}")
        what = "name every record" if splits.records else "take every base"
        raise DataError(f"{rule} {what}: leave one to train on")
