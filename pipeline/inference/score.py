"""`megabase score`: how likely a model finds the sequences of a FASTA file, each base given all bases before it.

Every region (a record, or a line of a BED file) is read in one walk from its first base to its last, in blocks, with a
state of bounded size; the opposite strand in a second walk from its own first base. So memory does not grow with the
region. Short regions are walked over together, as rows of one batch. The walks over about a million bases are one task
of `partial`, which keeps what is finished over a kill and shares the tasks among processes.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from pyarrow import parquet
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from megabase.datamodules.alphabet import PAD
from megabase.datamodules.prepare.portions import Portion
from megabase.datamodules.progress import bar
from megabase.models.generation import check_length, start
from megabase.pipeline.errors import UserError
from megabase.pipeline.inference.genome import Genome, Region
from megabase.pipeline.inference.model import LoadedModel, load_model, warn_of_context
from megabase.pipeline.inference.partial import WHOLE, Partial, device_of_process, grouped, is_finished
from megabase.pipeline.inference.tracks import Hub, TrackRows, Tracks, directory_of, in_order, write_tracks
from megabase.pipeline.inference.walk import Walk, batches, walk_over

TASK_BASES = 1 << 20
"""A task walks over consecutive regions that have at least this many bases together."""
FORWARD, REVERSE, BOTH = "forward", "reverse", "both"
STRANDS = {FORWARD: (FORWARD,), REVERSE: (REVERSE,), BOTH: (FORWARD, REVERSE)}
SCHEMA = pa.schema(
    [
        ("record", pa.string()),
        ("start", pa.int64()),
        ("end", pa.int64()),
        ("bases", pa.int64()),
        ("other", pa.int64()),
        ("nats_forward", pa.float64()),
        ("nats_reverse", pa.float64()),
        ("nats", pa.float64()),
        ("bits_per_base", pa.float64()),
    ]
)
"""Columns of the table. bases: letters, which are scored; other: N and all else. nats: −log-probability of all bases,
the mean of the strands. Empty: a strand that was not asked for; bits per base of a region without bases."""


@dataclass(frozen=True)
class ScoreOptions:
    """The arguments of the command.

    Attributes:
        model: a run directory or an export.
        fasta: the sequences.
        output: the Parquet file to write.
        regions: BED file; None: all records.
        strand: one of STRANDS.
        step: of the checkpoint; "best"; None: the newest intact one.
        block: bases that are read at a time.
        portion: of the tasks, for this process.
        tracks: the bigWig files to write beside the table.
        assembly: what a browser calls the genome; None: the name of the FASTA file.
        json: print a summary as JSON.
    """

    model: Path
    fasta: Path
    output: Path
    regions: Path | None = None
    strand: str = BOTH
    step: int | str | None = None
    block: int = 1 << 14
    portion: Portion = WHOLE
    tracks: Tracks = field(default_factory=Tracks)
    assembly: str | None = None
    json: bool = False


@dataclass(frozen=True)
class Task:
    """Walks over some regions along one strand."""

    places: Collection[int]
    strand: str


def run(options: ScoreOptions) -> int:
    """Score a FASTA file; returns the exit code.

    Raises:
        UserError, DataError, ConfigError: bad input; nothing was scored.
        RunError: the output cannot be written.
    """
    if is_finished(options.output, options.portion):
        return 0
    options.tracks.check_directory(options.output)
    genome = Genome(options.fasta)
    regions = genome.records() if options.regions is None else genome.regions(options.regions)
    loaded = load_model(options.model, options.step)
    check(loaded, regions, options.strand)
    options.tracks.check(loaded.alphabet, genome, regions)
    tasks = split_up(regions, STRANDS[options.strand])
    sizes = {name: sum(len(regions[place]) for place in task.places) for name, task in tasks.items()}
    partial = Partial.open(options.output, call_of(options, loaded, genome, regions), sizes, options.portion)
    score(loaded, genome, regions, options, tasks, partial)
    if not partial.is_complete():
        return 0
    if partial.publish(*outputs(options, loaded, genome, regions, tasks, partial)):
        report(options, loaded)
    return 0


def outputs(
    options: ScoreOptions,
    loaded: LoadedModel,
    genome: Genome,
    regions: Sequence[Region],
    tasks: Mapping[str, Task],
    partial: Partial,
) -> list[tuple[Path, Callable[[Path], None]]]:
    """What is written when all tasks are finished, and how: the directory of tracks, if any, and the table."""
    table = (options.output, functools.partial(write, regions=regions, tasks=tasks, partial=partial))
    if not options.tracks.names:
        return [table]
    files = {strand: track_files(regions, tasks, partial, strand) for strand in STRANDS[options.strand]}
    hub = Hub.of(options.output, options.assembly or options.fasta.name.split(".")[0], loaded.source)
    scored = in_order(genome, regions)
    tracks = functools.partial(
        write_tracks, hub=hub, tracks=options.tracks, lengths=genome.lengths, regions=scored, files=files
    )
    return [(directory_of(options.output), tracks), table]


def check(loaded: LoadedModel, regions: list[Region], strand: str) -> None:
    """Raise UserError or ConfigError if the model cannot score the regions; warn of contexts longer than trained."""
    if strand != FORWARD and loaded.alphabet.complement is None:
        raise UserError(
            f"the model's alphabet {loaded.alphabet.name!r} has one strand only: add --strand {FORWARD}"
        )
    start(loaded.model, 1)
    longest = max(len(region) for region in regions)
    check_length(loaded.model, 1 + longest)
    warn_of_context(loaded, longest, f"the longest region has {longest:,} bases")


def split_up(regions: Sequence[Region], strands: Sequence[str], suffix: str = ".json") -> dict[str, Task]:
    """The tasks, by the names of their files."""
    groups = grouped([len(region) for region in regions], TASK_BASES)
    return {
        f"{number:06d}-{one}{suffix}": Task(places, one)
        for number, places in enumerate(groups)
        for one in strands
    }


def call_of(
    options: ScoreOptions, loaded: LoadedModel, genome: Genome, regions: Sequence[Region]
) -> dict[str, Any]:
    """All that the result depends on."""
    return {
        "model": asdict(loaded.source),
        "fasta": genome.identity(),
        "regions": [[region.record, region.start, region.end] for region in regions],
        "strand": options.strand,
        "block": options.block,
        "tracks": list(options.tracks.names),
    }


def score(
    loaded: LoadedModel,
    genome: Genome,
    regions: Sequence[Region],
    options: ScoreOptions,
    tasks: Mapping[str, Task],
    partial: Partial,
) -> None:
    """Do the tasks of this process that are not finished."""
    device = device_of_process()
    loaded.model.to(device)
    todo = partial.todo()
    total = sum(partial.sizes[name] for name in todo)
    with bar("scoring", total, shown=sys.stderr.isatty()) as advance:
        for name in todo:
            walks: dict[int, Walk] = {}
            walk = functools.partial(
                do_task, loaded, genome, regions, options, tasks[name], device, advance, walks
            )
            if options.tracks.names:
                partial.add(values_of(name), walk)
            else:
                walk(None)
            partial.add_json(name, [asdict(walks[place]) for place in tasks[name].places])


def do_task(
    loaded: LoadedModel,
    genome: Genome,
    regions: Sequence[Region],
    options: ScoreOptions,
    task: Task,
    device: torch.device,
    advance: Callable[[int], None],
    walks: dict[int, Walk],
    path: Path | None,
) -> None:
    """Walk over the regions of a task, collect what was found by their places, and write the values of the tracks."""
    firsts = first_rows(task, regions)
    with nullcontext() if path is None else path.open("wb") as file:
        for places in batches(task.places, regions, options.block):
            rows = [regions[place] for place in places]
            tokens = tokens_of(loaded, genome, rows, task.strand, options.block)
            values = None
            if file is not None:
                values = TrackRows(
                    options.tracks, file, task.strand == REVERSE, [firsts[place] for place in places]
                )
            found = walk_over(loaded, (block.to(device) for block in tokens), rows, advance, values)
            walks |= dict(zip(places, found, strict=True))


def first_rows(task: Task, regions: Sequence[Region]) -> dict[int, int]:
    """The row of the first base of each region in the file of a task's values."""
    lengths = [len(regions[place]) for place in task.places]
    return dict(zip(task.places, itertools.accumulate([0, *lengths]), strict=False))


def values_of(task: str) -> str:
    """The file of a task's values."""
    return f"{task}.values"


def track_files(
    regions: Sequence[Region], tasks: Mapping[str, Task], partial: Partial, strand: str
) -> dict[Region, tuple[Path, int]]:
    """The file with the values of each region on a strand, and the row of its first base."""
    return {
        regions[place]: (partial.read(values_of(name)), first)
        for name, task in tasks.items()
        if task.strand == strand
        for place, first in first_rows(task, regions).items()
    }


def tokens_of(
    loaded: LoadedModel, genome: Genome, rows: Sequence[Region], strand: str, block: int
) -> Iterator[Tensor]:
    """Tokens (rows, n) in blocks, in the order in which the strand is read; short rows are padded at their end."""
    alphabet = loaded.alphabet

    def encoded(letters: NDArray[np.uint8]) -> Tensor:
        letters = alphabet.reverse_complement(letters) if strand == REVERSE else letters
        return torch.from_numpy(alphabet.encode(letters)).long()

    if len(rows) == 1:
        for letters in genome.letters(rows[0], block, backwards=strand == REVERSE):
            yield encoded(letters)[None]
    else:
        whole = [encoded(next(genome.letters(row, len(row)))) for row in rows]
        yield pad_sequence(whole, batch_first=True, padding_value=PAD)


def row_of(region: Region, walks: Mapping[str, Walk]) -> dict[str, Any]:
    """A row of the table."""
    some = next(iter(walks.values()))
    nats = sum(walk.nats for walk in walks.values()) / len(walks)
    return {
        **asdict(region),
        "bases": some.bases,
        "other": some.other,
        "nats_forward": walks[FORWARD].nats if FORWARD in walks else None,
        "nats_reverse": walks[REVERSE].nats if REVERSE in walks else None,
        "nats": nats,
        "bits_per_base": nats / some.bases / math.log(2) if some.bases else None,
    }


def write(path: Path, regions: Sequence[Region], tasks: Mapping[str, Task], partial: Partial) -> None:
    """Write the table of all tasks. Raises OSError."""
    walks: list[dict[str, Walk]] = [{} for _ in regions]
    for name, task in tasks.items():
        for place, found in zip(task.places, json.loads(partial.read(name).read_bytes()), strict=True):
            walks[place][task.strand] = Walk(**found)
    rows = [row_of(region, of) for region, of in zip(regions, walks, strict=True)]
    parquet.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), path)


def report(options: ScoreOptions, loaded: LoadedModel) -> None:
    """Print the sums over all rows, and where they come from."""
    columns = parquet.read_table(options.output, columns=["bases", "other", "nats"]).to_pydict()
    bases, nats = sum(columns["bases"]), sum(columns["nats"])
    summary = {
        "output": str(options.output),
        "model": asdict(loaded.source),
        "strand": options.strand,
        "regions": len(columns["bases"]),
        "bases": bases,
        "other": sum(columns["other"]),
        "nats": nats,
        "bits_per_base": round(nats / bases / math.log(2), 6) if bases else None,
    }
    if options.json:
        print(json.dumps(summary))
    else:
        print(
            f"{options.output}: {summary['bits_per_base']} bits per base; bases: {bases:,}, "
            f"regions: {summary['regions']:,}"
        )
