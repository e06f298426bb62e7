"""`megabase score`: how likely a model finds the sequences of a FASTA file, each base given all bases before it.

Every region (a record, or a line of a BED file) is read in one walk from its first base to its last, in blocks, with a
state of bounded size; the opposite strand in a second walk from its own first base. So memory does not grow with the
region. What a walk found is published in OUTPUT.partial before the next one starts: after a kill the same command goes
on there. The table itself is published by rename when all walks are done.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
import torch.nn.functional as F
from pyarrow import parquet
from torch import Tensor

from megabase.datamodules.alphabet import BOS, FIRST_LETTER
from megabase.datamodules.files import publish_json, sync
from megabase.datamodules.progress import bar
from megabase.models.chance import Seeds
from megabase.models.generation import read_block, start
from megabase.pipeline.errors import RunError, UserError
from megabase.pipeline.files import read_object
from megabase.pipeline.inference.genome import Genome, Region
from megabase.pipeline.inference.model import LoadedModel, load_model

logger = logging.getLogger(__name__)

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
        json: print a summary as JSON.
    """

    model: Path
    fasta: Path
    output: Path
    regions: Path | None = None
    strand: str = BOTH
    step: int | str | None = None
    block: int = 1 << 14
    json: bool = False


@dataclass(frozen=True)
class Walk:
    """What one walk found: nats of all bases, number of bases, and of letters that are none."""

    nats: float
    bases: int
    other: int


def run(options: ScoreOptions) -> int:
    """Score a FASTA file; returns the exit code.

    Raises:
        UserError, DataError, ConfigError: bad input; nothing was scored.
        RunError: the output cannot be written.
    """
    if options.output.exists():
        raise UserError(f"{options.output} exists: remove it, or choose another --output")
    genome = Genome(options.fasta)
    regions = genome.records() if options.regions is None else genome.regions(options.regions)
    loaded = load_model(options.model, options.step)
    check(loaded, regions, options.strand)
    try:
        parts = Parts.open(options, loaded, genome, regions)
        walks = score(loaded, genome, regions, options, parts)
        rows = [row_of(region, walks[number]) for number, region in enumerate(regions)]
        write(options.output, rows)
        shutil.rmtree(parts.directory)
    except OSError as error:
        raise RunError(f"{options.output}: cannot be written: {error}") from error
    summary = summarize(rows, options, loaded)
    if options.json:
        print(json.dumps(summary))
    else:
        print(
            f"{options.output}: {summary['bits_per_base']} bits per base; bases: {summary['bases']:,}, "
            f"regions: {summary['regions']:,}"
        )
    return 0


def check(loaded: LoadedModel, regions: list[Region], strand: str) -> None:
    """Raise UserError or ConfigError if the model cannot score the regions; warn of contexts longer than trained."""
    if strand != FORWARD and loaded.alphabet.complement is None:
        raise UserError(
            f"the model's alphabet {loaded.alphabet.name!r} has one strand only: add --strand {FORWARD}"
        )
    start(loaded.model, 1)
    longest, trained = max(len(region) for region in regions), loaded.config.data.length
    loaded.model.body.config.validate(1 + longest)
    if longest > trained:
        logger.warning(
            f"the longest region has {longest:,} bases, and the model was trained on windows of {trained:,}: it was "
            "never trained to use more context than that"
        )


@dataclass(frozen=True)
class Parts:
    """The directory OUTPUT.partial: what was scored already, one file for each walk."""

    directory: Path

    @classmethod
    def open(cls, options: ScoreOptions, loaded: LoadedModel, genome: Genome, regions: list[Region]) -> Parts:
        """Make the directory, or go on with the one that an interrupted call of the same kind left.

        Raises:
            UserError: it was left by a call with another model, other sequences or options.
            OSError: it cannot be written.
        """
        directory = options.output.with_name(f"{options.output.name}.partial")
        status = genome.path.stat()
        call = {
            "model": asdict(loaded.source),
            "fasta": [str(genome.path.resolve()), status.st_size, status.st_mtime_ns],
            "regions": [[region.record, region.start, region.end] for region in regions],
            "strand": options.strand,
            "block": options.block,
        }
        directory.mkdir(parents=True, exist_ok=True)
        settings = directory / "call.json"
        if not settings.exists():
            publish_json(settings, call)
        elif read_object(settings) != call:
            raise UserError(
                f"{directory} was left by a call with another model, FASTA file or options: remove it, or choose "
                "another --output"
            )
        return cls(directory)

    def find(self, number: int, strand: str) -> Walk | None:
        """What the walk over a region found, if it was finished."""
        found = read_object(self._path(number, strand))
        return Walk(**found) if found else None

    def add(self, number: int, strand: str, walk: Walk) -> None:
        """Publish what a walk found."""
        publish_json(self._path(number, strand), asdict(walk))

    def _path(self, number: int, strand: str) -> Path:
        return self.directory / f"{number:08d}-{strand}.json"


def score(
    loaded: LoadedModel, genome: Genome, regions: list[Region], options: ScoreOptions, parts: Parts
) -> list[dict[str, Walk]]:
    """Walk over all regions that were not scored yet: what was found, by strand, for each region."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded.model.to(device)
    found: list[dict[str, Walk]] = []
    strands = STRANDS[options.strand]
    total = sum(len(region) for region in regions) * len(strands)
    with bar("scoring", total, shown=sys.stderr.isatty()) as advance:
        for number, region in enumerate(regions):
            found.append({})
            for strand in strands:
                walk = parts.find(number, strand)
                if walk is None:
                    pieces = tokens_of(loaded, genome, region, strand, options.block)
                    walk = walk_over(loaded, (piece.to(device) for piece in pieces), advance)
                    parts.add(number, strand, walk)
                else:
                    advance(len(region))
                found[number][strand] = walk
    return found


def tokens_of(
    loaded: LoadedModel, genome: Genome, region: Region, strand: str, block: int
) -> Iterator[Tensor]:
    """Tokens (1, n) of a region in blocks, in the order in which the strand is read."""
    alphabet = loaded.alphabet
    for letters in genome.letters(region, block, backwards=strand == REVERSE):
        letters = alphabet.reverse_complement(letters) if strand == REVERSE else letters
        yield torch.from_numpy(alphabet.encode(letters)).long()[None]


def walk_over(loaded: LoadedModel, blocks: Iterator[Tensor], advance: Callable[[int], None]) -> Walk:
    """Read blocks of tokens (1, n), with BOS before the first one, and add up the nats of all letters.

    Raises:
        RunError: a log-probability is not finite.
    """
    state = start(loaded.model, 1, seeds=Seeds(run=loaded.config.run.seed))
    nats, bases, other = 0.0, 0, 0
    for tokens in blocks:
        length = tokens.shape[1]
        given = F.pad(tokens, (1, 0), value=BOS) if state.position == 0 else tokens
        log_probs = read_block(loaded.model, given, state).log_probs[:, -length:]
        letter = tokens >= FIRST_LETTER
        nats -= float(log_probs.double().where(letter, 0.0).sum())
        count = int(letter.sum())
        bases, other = bases + count, other + length - count
        advance(length)
    if not math.isfinite(nats):
        raise RunError(
            "the model's log-probabilities are not finite: take a checkpoint from before it diverged"
        )
    return Walk(nats, bases, other)


def row_of(region: Region, walks: dict[str, Walk]) -> dict[str, Any]:
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


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Publish the table by rename. Raises OSError."""
    partial = path.with_name(f"{path.name}.partial") / path.name
    parquet.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), partial)
    sync(partial)
    partial.rename(path)


def summarize(rows: list[dict[str, Any]], options: ScoreOptions, loaded: LoadedModel) -> dict[str, Any]:
    """The sums over all rows, and where they come from."""
    bases, nats = sum(row["bases"] for row in rows), sum(row["nats"] for row in rows)
    return {
        "output": str(options.output),
        "model": asdict(loaded.source),
        "strand": options.strand,
        "regions": len(rows),
        "bases": bases,
        "other": sum(row["other"] for row in rows),
        "nats": nats,
        "bits_per_base": round(nats / bases / math.log(2), 6) if bases else None,
    }
