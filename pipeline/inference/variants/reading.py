"""Log-probabilities of alleles and of what follows them, read from forks of a state.

Many rows are read at once: all to the length of the longest one. The tokens that fill a row up follow its own, so they
change nothing in it: the model is causal. Log-probabilities are fp32, and their sums fp64.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megabase.datamodules.alphabet import BOS, FIRST_LETTER, OTHER
from megabase.models.chance import Seeds
from megabase.models.generation import State, read_block, start
from megabase.models.reformer import Reformer
from megabase.pipeline.errors import RunError

FORK_BYTES = {"cpu": 1 << 26, "cuda": 1 << 31}
"""Forks that are read at once take no more memory than this, unless a single one does. On a CPU, many large ones are
slower than one after another."""

TERMS = np.dtype(
    [
        ("alternate", np.float64),
        ("reference", np.float64),
        ("alternate_downstream", np.float64),
        ("reference_downstream", np.float64),
        ("alternate_bases", np.int64),
        ("reference_bases", np.int64),
        ("downstream_bases", np.int64),
    ]
)
"""What is found for an edit on a strand: log-probabilities in nats of the bases that replace others and of those that
they replace, and of the bases that follow, after either; and how many bases were scored: letters, not N."""


@dataclass(frozen=True)
class Sums:
    """Log-probability in nats of some positions, and how many of them hold letters, which alone are scored."""

    nats: float
    bases: int


class Scored:
    """Positions that were read: sums over any of them.

    Args:
        log_probs: (n,), of each token given those before it.
        tokens: (n,).

    Raises:
        RunError: a letter's log-probability is not finite.
    """

    def __init__(self, log_probs: Tensor, tokens: NDArray[np.integer]) -> None:
        letters = tokens >= FIRST_LETTER
        values = np.where(letters, log_probs.double().cpu().numpy(), 0.0)
        if not np.isfinite(values).all():
            raise RunError(
                "the model's log-probabilities are not finite: take a checkpoint from before it diverged"
            )
        self._nats = np.concatenate(([0.0], values.cumsum()))
        self._bases = np.concatenate(([0], letters.cumsum()))

    def between(self, start: int, end: int) -> Sums:
        """Sums over [start, end)."""
        return Sums(float(self._nats[end] - self._nats[start]), int(self._bases[end] - self._bases[start]))


@dataclass(frozen=True)
class Reader:
    """How to read.

    Attributes:
        model: on its device.
        seeds: of the hash rotations.
        block: tokens that are read at a time, over all rows.
        downstream: bases that are scored after an edit.
        spread: edits that start within so many bases of each other are read from forks of one state: each reads the
            bases from there to its own start again.
    """

    model: Reformer
    seeds: Seeds
    block: int = 1 << 14
    downstream: int = 1024
    spread: int = 256

    def start(self, batch: int) -> State:
        """A state that has read the token that begins every sequence."""
        state = start(self.model, batch, seeds=self.seeds)
        self.read(np.full((batch, 1), BOS), state)
        return state

    def read(self, tokens: NDArray[np.integer], state: State) -> Tensor:
        """Read tokens (batch, n), in pieces; returns their log-probabilities (batch, n) on the CPU."""
        at_once = max(1, self.block // tokens.shape[0])
        device = next(self.model.parameters()).device
        given = torch.from_numpy(tokens.astype(np.int64)).to(device).split(at_once, dim=1)
        return torch.cat([read_block(self.model, piece, state).log_probs.cpu() for piece in given], dim=1)


@dataclass(frozen=True)
class Row:
    """What is read from a fork of sequence number `sequence` of a state: tokens up to the allele, the allele, and what
    follows it. Any of them may be empty."""

    sequence: int
    before: NDArray[np.integer]
    allele: NDArray[np.integer]
    after: NDArray[np.integer]

    def __len__(self) -> int:
        return len(self.before) + len(self.allele) + len(self.after)


def read_rows(reader: Reader, state: State, rows: Sequence[Row]) -> list[tuple[Sums, Sums]]:
    """Read rows, each from its own fork of the state, which is not changed: sums over its allele and what follows."""
    found: list[tuple[Sums, Sums]] = [(Sums(0.0, 0), Sums(0.0, 0))] * len(rows)
    device = next(reader.model.parameters()).device
    most = max(1, FORK_BYTES[device.type] // max(1, state.nbytes // state.batch))
    for numbers in batches([len(row) for row in rows], reader.block, most):
        tokens = np.full((len(numbers), max(len(rows[n]) for n in numbers)), OTHER)
        for line, number in zip(tokens, numbers, strict=True):
            row = rows[number]
            line[: len(row)] = np.concatenate((row.before, row.allele, row.after))
        log_probs = reader.read(tokens, state.fork([rows[n].sequence for n in numbers]))
        for line, number, values in zip(tokens, numbers, log_probs, strict=True):
            row = rows[number]
            scored = Scored(values, line)
            middle = len(row.before) + len(row.allele)
            found[number] = (scored.between(len(row.before), middle), scored.between(middle, len(row)))
    return found


def batches(lengths: Sequence[int], tokens: int, most: int) -> Iterator[list[int]]:
    """Numbers of the rows that are read together: of like lengths, at most `most` of them and about `tokens` tokens.

    Rows without tokens are left out.
    """
    batch: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda n: (lengths[n], n)):
        if not lengths[number]:
            continue
        if batch and (len(batch) == most or (len(batch) + 1) * lengths[number] > tokens):
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch
