"""What `megabase prepare` does: records -> splits -> shards, with a progress bar over the input's bytes."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from datamodules.alphabet import Alphabet
from datamodules.errors import DataError
from datamodules.index import ShardIndex
from datamodules.records import Record, check_inputs, read_records
from datamodules.shards import SHARD_BYTES, ShardWriter
from datamodules.splits import Splits


def prepare(
    inputs: Sequence[str | Path],
    output: str | Path,
    alphabet: str = "dna",
    valid: str | float | None = None,
    test: str | float | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: bool = True,
) -> ShardIndex:
    """Write the records of `inputs` as shards into the new directory `output`; returns them opened.

    valid, test: a fraction in (0, 1), taken from the end of every record, or comma separated record names.
    shard_bytes: size to keep a shard below. progress: show a bar over the input's bytes on stderr.

    Raises DataError for inputs that cannot be read (see `read_records`), for splits that cannot be (see
    `Splits.parse`) or leave nothing to train on, and for an output that exists or cannot be made. Nothing of
    `output` exists unless all of it does.
    """
    paths, output = [Path(path) for path in inputs], Path(output)
    letters = Alphabet.named(alphabet)
    splits = Splits.parse(valid, test)
    check_inputs(paths)
    bases, trained = 0, False
    names: set[str] = set()
    with ShardWriter(output, letters, shard_bytes) as writer, _records(paths, letters, progress) as records:
        for record in records:
            writer.write(record, splits.of(record.name, len(record.sequence)))
            bases += len(record.sequence)
            trained = trained or record.name not in splits.named
            if record.name in splits.named:
                names.add(record.name)
        splits.check_names(names)
        if not bases:
            raise DataError(f"{paths[0]}: the input's records hold no base at all")
        if not trained:
            raise DataError(f"--valid {valid} and --test {test} name every record: leave one to train on")
    return ShardIndex.open(output)


@contextmanager
def _records(paths: Sequence[Path], letters: Alphabet, shown: bool) -> Iterator[Iterator[Record]]:
    """The records of `paths`, and a bar that moves as their files are read."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as bar:
        task = bar.add_task("Preparing", total=sum(path.stat().st_size for path in paths))

        @contextmanager
        def counted(path: Path) -> Iterator[BinaryIO]:
            with path.open("rb") as file:
                yield bar.wrap_file(file, task_id=task)

        yield read_records(paths, letters, counted)
