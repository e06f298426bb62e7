"""How `megabase embed` reads: walks over regions, whose pooled states become rows of a file.

Regions are walked over as `score` does: in blocks, with a state of bounded size, short ones together, the opposite
strand from its own first base. The state of a base is the one after it was read. Reading block by block gives the
states of one pass. A model that cannot read in blocks (it sees both sides, or has `attend: chunk`) reads every region
by itself and in one pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from megabase.datamodules.alphabet import BOS, FIRST_LETTER
from megabase.datamodules.config import MASKED
from megabase.models.call import Call
from megabase.models.chance import Seeds
from megabase.models.generation import read_block, start
from megabase.pipeline.errors import RunError
from megabase.pipeline.inference.genome import Genome, Region
from megabase.pipeline.inference.model import LoadedModel
from megabase.pipeline.inference.pooling import Pool, Pooling
from megabase.pipeline.inference.score import REVERSE, Task, tokens_of
from megabase.pipeline.inference.walk import batches


@dataclass(frozen=True)
class Reader:
    """Reads tokens of regions and gives the states of one layer.

    Attributes:
        loaded: the model.
        layer: as `read_block` counts them.
        blocks: whether it can read in blocks.
    """

    loaded: LoadedModel
    layer: int
    blocks: bool

    def read(self, blocks: Iterator[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Blocks of tokens (rows, n) and the state (rows, n, width) after each token.

        Raises:
            RunError: a state is not finite.
        """
        model, seeds = self.loaded.model, Seeds(run=self.loaded.config.run.seed)
        device = next(model.parameters()).device
        state = None
        for tokens in blocks:
            begins = state is None and self.loaded.config.data.objective != MASKED
            given = (F.pad(tokens, (1, 0), value=BOS) if begins else tokens).to(device)
            if self.blocks:
                state = start(model, len(tokens), seeds=seeds) if state is None else state
                states = read_block(model, given, state, layers=[self.layer]).hidden[self.layer]
            else:
                states = model.body.outputs(given, Call(seeds), [self.layer])[self.layer]
            if not states.isfinite().all():
                raise RunError("the model's states are not finite: take a checkpoint from before it diverged")
            yield tokens, states[:, -tokens.shape[1] :]


@dataclass(frozen=True)
class Walks:
    """One task: the walks over some regions along a strand, whose rows become a file."""

    reader: Reader
    genome: Genome
    regions: Sequence[Region]
    task: Task
    pool: Pool
    block: int
    advance: Callable[[int], None]

    def write(self, path: Path) -> None:
        """Walk, and write the rows in the order of the regions."""
        rows = [self.pool.rows(len(self.regions[place])) for place in self.task.places]
        firsts = dict(zip(self.task.places, np.cumsum([0, *rows]).tolist(), strict=False))
        with path.open("wb") as file:
            for places in self._batches():
                self._walk(places, [firsts[place] for place in places], file)

    def _batches(self) -> Iterator[list[int]]:
        """Regions that are read together; one by one if the model reads in one pass, where padding would count."""
        if self.reader.blocks:
            return batches(self.task.places, self.regions, self.block)
        return ([place] for place in self.task.places)

    def _walk(self, places: Sequence[int], firsts: Sequence[int], file: BinaryIO) -> None:
        """Walk over regions that are read together; the rows of each begin at a row of the file."""
        rows = [self.regions[place] for place in places]
        reverse = self.task.strand == REVERSE
        poolings = [
            Pooling(self.pool.part(len(region), reverse=reverse), partial(self._write_rows, file, first))
            for region, first in zip(rows, firsts, strict=True)
        ]
        block = self.block if self.reader.blocks else max(map(len, rows))
        blocks = tokens_of(self.reader.loaded, self.genome, rows, self.task.strand, block)
        read = 0
        for tokens, states in self.reader.read(blocks):
            for region, pooling, of_tokens, of_row in zip(rows, poolings, tokens, states, strict=True):
                n = min(tokens.shape[1], len(region) - read)
                letter, of_bases = of_tokens[:n].to(states.device) >= FIRST_LETTER, of_row[:n]
                if reverse:
                    pooling.add(len(region) - read - n, of_bases.flip(0), letter.flip(0))
                else:
                    pooling.add(read, of_bases, letter)
                self.advance(n)
            read += tokens.shape[1]

    def _write_rows(self, file: BinaryIO, first: int, number: int, means: Tensor, letters: Tensor) -> None:
        """Write rows `number` and following of a region whose first row is `first` in the file."""
        rows = np.empty(len(means), dtype=row_type(means.shape[1]))
        rows["bases"], rows["state"] = letters.cpu().numpy(), means.float().cpu().numpy()
        file.seek((first + number) * rows.itemsize)
        file.write(rows.tobytes())


def row_type(width: int) -> np.dtype[np.void]:
    """A row of the file of a task."""
    return np.dtype([("bases", "<i8"), ("state", "<f4", (width,))])
