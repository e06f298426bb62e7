"""Walks over sequences: the log-probability of every base given all before it, added up in memory of bounded size.

`megabase score` walks over the regions of a FASTA file, and the MLflow model over the sequences that it is given. So
this imports no more than a model needs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence, Sized
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from megabase.datamodules.alphabet import BOS, FIRST_LETTER, PAD
from megabase.models.chance import Seeds
from megabase.models.generation import read_block, start
from megabase.pipeline.errors import RunError
from megabase.pipeline.inference.model import LoadedModel

if TYPE_CHECKING:
    from megabase.pipeline.inference.tracks import TrackRows


@dataclass(frozen=True)
class Walk:
    """What one walk found: nats of all bases, number of bases, and of letters that are none."""

    nats: float
    bases: int
    other: int


def batches(places: Collection[int], regions: Sequence[Sized], block: int) -> Iterator[list[int]]:
    """Places of regions to read together, of similar length: at most `block` tokens with padding, or one region."""
    batch: list[int] = []
    for place in sorted(places, key=lambda place: len(regions[place])):
        if batch and (len(batch) + 1) * len(regions[place]) > block:
            yield batch
            batch = []
        batch.append(place)
    yield batch


def walk_over(
    loaded: LoadedModel,
    blocks: Iterator[Tensor],
    rows: Sequence[Sized],
    advance: Callable[[int], None],
    values: TrackRows | None = None,
) -> list[Walk]:
    """Read blocks of tokens (rows, n), with BOS before the first one, and add up the nats of all letters of each row.

    Args:
        values: what writes the values of the tracks, if any.

    Raises:
        RunError: a log-probability is not finite.
    """
    state = start(loaded.model, len(rows), seeds=Seeds(run=loaded.config.run.seed))
    nats = torch.zeros(len(rows), dtype=torch.float64)
    bases = torch.zeros(len(rows), dtype=torch.int64)
    for tokens in blocks:
        length = tokens.shape[1]
        given = F.pad(tokens, (1, 0), value=BOS) if state.position == 0 else tokens
        read = max(state.position - 1, 0)
        every_token = values is not None and values.tracks.every_token
        found = read_block(loaded.model, given, state, every_token=every_token)
        if values is not None:
            values.add(rows, read, found, tokens)
        log_probs = found.log_probs[:, -length:]
        letter = tokens >= FIRST_LETTER
        nats -= log_probs.double().where(letter, 0.0).sum(1).cpu()
        bases += letter.sum(1).cpu()
        advance(int((tokens != PAD).sum()))
    if not nats.isfinite().all():
        raise RunError(
            "the model's log-probabilities are not finite: take a checkpoint from before it diverged"
        )
    return [
        Walk(of, count, len(row) - count)
        for of, count, row in zip(nats.tolist(), bases.tolist(), rows, strict=True)
    ]
