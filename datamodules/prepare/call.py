"""A call of prepare: its checked arguments, its units of work, and the directory in which they are written."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from megabase.datamodules.alphabet import Alphabet
from megabase.datamodules.errors import DataError
from megabase.datamodules.index.index_file import INDEX_VERSION
from megabase.datamodules.prepare.inputs import check_inputs, expand, pipes_as_files, prefixes
from megabase.datamodules.prepare.records import compression
from megabase.datamodules.prepare.relatives import checked_threshold
from megabase.datamodules.prepare.sketch import Sampling, finest_scale, scale_for
from megabase.datamodules.prepare.splits import END, SIMILARITY, Splits
from megabase.datamodules.prepare.unfinished import Unfinished, Unit, check_output, digest, unfinished
from megabase.datamodules.prepare.writer import SHARD_BYTES

_PACKED = 4  # bases in a byte of compressed DNA, about
_UNITS_PER_SHARD = 8
"""Small files share a unit of up to 1/8 of a shard: enough units to keep the processes busy, and few small shards."""


@dataclass(frozen=True)
class Job:
    """The settings that every unit is written with.

    Attributes:
        folder: of the shards.
        prefixes: what is put before the names of the records of each file; empty for nothing.
        field, allow_other: as in `read_file`.
        sampling: how 31-mers are sampled; None if they are not.
    """

    folder: Path
    alphabet: Alphabet
    splits: Splits
    shard_bytes: int
    prefixes: dict[Path, str]
    field: str
    allow_other: bool
    sampling: Sampling | None


@dataclass(frozen=True)
class Call:
    """The checked arguments of a prepare; `prepare` documents them.

    Attributes:
        paths: of the inputs, expanded.
        arguments: what decides the result, and must be the same to continue: option -> JSON value.
        rule: the options of the splits, for messages.
        threshold: the similarity above which records are in one split.
    """

    paths: list[Path]
    output: Path
    alphabet: Alphabet
    splits: Splits
    threshold: float
    shard_bytes: int
    field: str
    allow_other: bool
    prefix_names: bool
    arguments: dict[str, object]
    rule: str


def checked(
    inputs: Sequence[str | Path],
    output: str | Path,
    *,
    alphabet: str = "dna",
    valid: str | float | None = None,
    test: str | float | None = None,
    intervals: str | Path | None = None,
    split_by: str = END,
    similarity: float | None = None,
    shard_bytes: int = SHARD_BYTES,
    field: str = "text",
    allow_other: bool = False,
    prefix_names: bool = False,
) -> Call:
    """Check the arguments of `prepare`; raises DataError as it does."""
    if "://" in str(output):
        raise DataError(
            f"{output}: shards are written to a local directory: give one, and copy them afterwards"
        )
    output = Path(output).absolute()
    paths, splits = expand(inputs, alphabet), Splits.parse(valid, test, intervals, split_by)
    letters, threshold = Alphabet.named(alphabet), checked_threshold(similarity, split_by, alphabet)
    check_inputs(paths)
    check_output(output)
    arguments: dict[str, object] = {
        "INPUT": [str(path.absolute()) for path in paths],
        "--alphabet": alphabet,
        "--valid": str(valid),
        "--test": str(test),
        "--intervals": digest(Path(intervals)) if intervals is not None else None,
        "--split-by": split_by if split_by != END else None,
        "--similarity": similarity,
        "--field": field,
        "--prefix-names": prefix_names or None,
        "shard_bytes": shard_bytes,
        "version of the index": INDEX_VERSION,
    }
    rule = " and ".join(
        f"{option} {value}" for option, value in (("--valid", valid), ("--test", test)) if value is not None
    )
    return Call(
        paths,
        output,
        letters,
        splits,
        threshold,
        shard_bytes,
        field,
        allow_other,
        prefix_names,
        arguments,
        rule,
    )


@contextmanager
def begun(call: Call, folder: Path | None) -> Iterator[tuple[Unfinished, Job, list[Unit]]]:
    """Make or continue the directory of unfinished work, with the settings and the units of the whole prepare.

    Args:
        call: of prepare.
        folder: in place of OUTPUT.partial.
    """
    with pipes_as_files(call.paths, call.output.parent) as files:
        sizes = [path.stat().st_size for path in files]
        sampled = call.alphabet.name == "dna" and call.splits.hold_out
        sampling = _sampling(files, sizes, call.splits.by) if sampled else None
        call.arguments["31-mers"] = sampling and [sampling.scale, sampling.of_records]
        with unfinished(call.output, call.arguments, continues=files == call.paths, folder=folder) as work:
            names = prefixes(files) if call.prefix_names else {}
            job = Job(
                work.folder,
                call.alphabet,
                call.splits,
                call.shard_bytes,
                names,
                call.field,
                call.allow_other,
                sampling,
            )
            yield work, job, units_of(files, sizes, call.shard_bytes)


def _sampling(files: Sequence[Path], sizes: Sequence[int], split_by: str) -> Sampling:
    """How 31-mers are sampled of files of these sizes: by record, as finely as possible, to compare short records."""
    bases = sum(size * (_PACKED if compression(path) else 1) for path, size in zip(files, sizes, strict=True))
    return Sampling(finest_scale(bases), True) if split_by == SIMILARITY else Sampling(scale_for(bases))


def units_of(paths: Sequence[Path], sizes: Sequence[int], shard_bytes: int) -> list[Unit]:
    """Group the inputs, in their order: neighbours share a unit while it stays below 1/8 of a shard."""
    units: list[tuple[int, list[Path]]] = []
    filled = limit = shard_bytes // _UNITS_PER_SHARD
    for number, (path, size) in enumerate(zip(paths, sizes, strict=True)):
        if units and filled + size <= limit:
            units[-1][1].append(path)
            filled += size
        else:
            units.append((number, [path]))
            filled = size
    return [Unit(number, tuple(together)) for number, together in units]
