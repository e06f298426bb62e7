"""`megabase embed`: the hidden states of a model for the sequences of a FASTA file, pooled over bases.

`embedding` reads them. The walks over about a million bases are one task of `partial`, whose file holds the rows of
their table. The output is written from these files piece by piece, so memory does not grow with the regions.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megabase.datamodules.config import MASKED
from megabase.datamodules.prepare.portions import Portion
from megabase.datamodules.progress import bar
from megabase.models.config import ConfigError
from megabase.models.generation import check_length, start
from megabase.pipeline.errors import UserError
from megabase.pipeline.inference.embedding import Reader, Walks, row_type
from megabase.pipeline.inference.embedding_files import WRITERS, Rows, Table, check_suffix
from megabase.pipeline.inference.genome import Genome, Region
from megabase.pipeline.inference.model import LoadedModel, load_model, warn_of_context
from megabase.pipeline.inference.partial import WHOLE, Partial, device_of_process, is_finished
from megabase.pipeline.inference.pooling import Pool
from megabase.pipeline.inference.score import FORWARD, REVERSE, STRANDS, Task, split_up

MEAN, CONCAT, LAST = "mean", "concat", "last"
BYTES_AT_ONCE = 1 << 25
"""Bytes of rows that are in memory at once when the output is written."""


@dataclass(frozen=True)
class EmbedOptions:
    """The arguments of the command.

    Attributes:
        model: a run directory or an export.
        fasta: the sequences.
        output: the file or directory to write; its suffix is the format.
        regions: BED file; None: all records.
        layer: the number of a layer from 0, or "last": after the last norm.
        pool: see `pooling.Pool.parse`.
        strand: "forward"; "reverse"; "mean" of both, or both side by side ("concat").
        dtype: of the numbers that are written, "float32" or "float16".
        step: of the checkpoint; "best"; None: the newest intact one.
        block: bases that are read at a time.
        portion: of the tasks, for this process.
        json: print a summary as JSON.
    """

    model: Path
    fasta: Path
    output: Path
    regions: Path | None = None
    layer: str = LAST
    pool: str = "mean"
    strand: str = MEAN
    dtype: str = "float32"
    step: int | str | None = None
    block: int = 1 << 14
    portion: Portion = WHOLE
    json: bool = False

    @property
    def strands(self) -> tuple[str, ...]:
        """The strands that are read."""
        return STRANDS.get(self.strand, (FORWARD, REVERSE))


def run(options: EmbedOptions) -> int:
    """Embed a FASTA file; returns the exit code.

    Raises:
        UserError, DataError, ConfigError: bad input; nothing was written.
        RunError: the output cannot be written, or the states are not finite.
    """
    check_suffix(options.output)
    pool = Pool.parse(options.pool)
    if is_finished(options.output, options.portion):
        return 0
    genome = Genome(options.fasta)
    regions = genome.records() if options.regions is None else genome.regions(options.regions)
    loaded = load_model(options.model, options.step)
    reader = Reader(loaded, layer_of(options.layer, loaded), blocks=check(loaded, regions, options, pool))
    tasks = split_up(regions, options.strands, ".rows")
    sizes = {name: sum(len(regions[place]) for place in task.places) for name, task in tasks.items()}
    partial = Partial.open(options.output, call_of(options, loaded, genome, regions), sizes, options.portion)
    loaded.model.to(device_of_process())
    todo = partial.todo()
    with bar("embedding", sum(sizes[name] for name in todo), shown=sys.stderr.isatty()) as advance:
        for name in todo:
            walks = Walks(reader, genome, regions, tasks[name], pool, options.block, advance)
            partial.add(name, walks.write)
    if not partial.is_complete():
        return 0
    table = table_of(options, loaded, pool, regions, tasks, partial)
    if partial.publish((options.output, lambda path: WRITERS[options.output.suffix](path, table))):
        report(options, loaded, table)
    return 0


def layer_of(text: str, loaded: LoadedModel) -> int:
    """The number of a layer, as `read_block` counts them. Raises UserError."""
    depth = loaded.config.model.depth
    if text == LAST:
        return depth
    if not (text.isascii() and text.isdigit() and int(text) < depth):
        raise UserError(
            f"--layer {text}: the model has the layers 0 to {depth - 1}, and last: after the last norm"
        )
    return int(text)


def check(loaded: LoadedModel, regions: Sequence[Region], options: EmbedOptions, pool: Pool) -> bool:
    """Check that the model can read the regions; warn of contexts longer than trained.

    Returns:
        Whether it can read in blocks.

    Raises:
        UserError, ConfigError: it cannot read them.
    """
    if options.strand != FORWARD and loaded.alphabet.complement is None:
        raise UserError(
            f"the model's alphabet {loaded.alphabet.name!r} has one strand only: add --strand {FORWARD}"
        )
    begins = int(loaded.config.data.objective != MASKED)
    for region in regions:
        pool.check(f"{region.record}:{region.start}-{region.end}", len(region))
        loaded.model.body.config.validate(begins + len(region))
    longest, trained = max(regions, key=len), loaded.config.data.length
    try:
        start(loaded.model, 1)
    except ConfigError as error:
        if len(longest) > trained:
            raise UserError(
                f"{longest.record}:{longest.start}-{longest.end} has {len(longest):,} bases: this model reads a "
                f"region in one pass, so at most the {trained:,} of a window of its training: give shorter --regions "
                f"({error})"
            ) from None
        return False
    check_length(loaded.model, begins + len(longest))
    warn_of_context(loaded, len(longest), f"the longest region has {len(longest):,} bases")
    return True


def call_of(
    options: EmbedOptions, loaded: LoadedModel, genome: Genome, regions: Sequence[Region]
) -> dict[str, Any]:
    """All that the result depends on."""
    return {
        "model": asdict(loaded.source),
        "fasta": genome.identity(),
        "regions": [[region.record, region.start, region.end] for region in regions],
        **{name: getattr(options, name) for name in ("layer", "pool", "strand", "dtype", "block")},
    }


def table_of(
    options: EmbedOptions,
    loaded: LoadedModel,
    pool: Pool,
    regions: Sequence[Region],
    tasks: Mapping[str, Task],
    partial: Partial,
) -> Table:
    """The output, whose rows are read from the files of the tasks."""
    groups: dict[tuple[int, ...], list[Path]] = {}
    for name, task in tasks.items():
        groups.setdefault(tuple(task.places), []).append(partial.read(name))
    names = list(dict.fromkeys(region.record for region in regions))
    codes = {name: code for code, name in enumerate(names)}
    width = 2 * loaded.config.model.dim
    source = Source(pool, options.strand, width)

    def pieces() -> Iterator[Rows]:
        for places, files in groups.items():
            yield from source.rows([regions[place] for place in places], codes, files)

    settings = {name: getattr(options, name) for name in ("layer", "pool", "strand")}
    return Table(
        records=names,
        rows=sum(pool.rows(len(region)) for region in regions),
        width=width * (2 if options.strand == CONCAT else 1),
        dtype=options.dtype,
        settings={"model": asdict(loaded.source), "fasta": str(options.fasta), **settings},
        pieces=pieces,
    )


@dataclass(frozen=True)
class Source:
    """Reads the files of the tasks piece by piece and puts the strands together."""

    pool: Pool
    strand: str
    width: int

    def rows(
        self, regions: Sequence[Region], codes: Mapping[str, int], files: Sequence[Path]
    ) -> Iterator[Rows]:
        """The rows of a group of regions from its files, one for each strand."""
        lengths = np.array([len(region) for region in regions])
        steps = np.array([self.pool.step(length) for length in lengths.tolist()])
        firsts = np.cumsum([0, *(self.pool.rows(length) for length in lengths.tolist())])
        begins = np.array([region.start for region in regions])
        records = np.array([codes[region.record] for region in regions])
        kind = row_type(self.width)
        at_once = max(1, BYTES_AT_ONCE // kind.itemsize)
        for first in range(0, int(firsts[-1]), at_once):
            number = np.arange(first, min(first + at_once, int(firsts[-1])))
            place = np.searchsorted(firsts, number, side="right") - 1
            start = begins[place] + (number - firsts[place]) * steps[place]
            end = np.minimum(start + steps[place], begins[place] + lengths[place])
            read = [np.fromfile(file, kind, len(number), offset=first * kind.itemsize) for file in files]
            yield Rows(
                records[place], start, end, read[0]["bases"], self._joined([of["state"] for of in read])
            )

    def _joined(self, strands: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
        if self.strand == CONCAT:
            return np.concatenate(strands, axis=1)
        return strands[0] if len(strands) == 1 else (strands[0] + strands[1]) * np.float32(0.5)


def report(options: EmbedOptions, loaded: LoadedModel, table: Table) -> None:
    """Print what was written."""
    summary = {"output": str(options.output), "rows": table.rows, "width": table.width, "dtype": table.dtype}
    if options.json:
        print(json.dumps({**summary, **table.settings}))
    else:
        print(
            f"{options.output}: rows: {table.rows:,}, numbers in each: {table.width:,} ({table.dtype}); layer "
            f"{options.layer}, pool {options.pool}, strand {options.strand}"
        )
