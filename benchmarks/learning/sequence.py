"""A genome or a text as it is: bits per letter of the last tenth, after training on the first nine.

`by_context` has what the same letters cost after contexts of different length: does a model gain by a longer one?
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.learning.models import Size, build
from benchmarks.learning.recall import as_tensors, summary
from benchmarks.learning.training import Batch, Budget, bits, train
from megabase.datamodules.alphabet import FIRST_LETTER, Alphabet
from megabase.datamodules.prepare.records import read_file
from megabase.datamodules.report.recall import recall_batch
from megabase.models import Reformer

HELD_OUT = 0.1
PROBES = 48
"""Windows that are scored."""

LAST = 128
"""Letters at the end of a window that are scored after contexts of different length."""

LEAST_CONTEXT = 256
"""Letters of the shortest part of a window that is read for that."""


@dataclass(frozen=True)
class Task:
    """Windows of one file.

    Attributes:
        path: FASTA, or any text for the alphabet `bytes`.
        alphabet: name of the alphabet.
        length: of a window.
        windows: of a step.
    """

    path: Path
    alphabet: str
    length: int
    windows: int

    @cached_property
    def letters(self) -> NDArray[Any]:
        """The longest record, as tokens."""
        alphabet = Alphabet.named(self.alphabet)
        longest = max((record.sequence for record in read_file(self.path, alphabet)), key=len)
        return alphabet.encode(np.frombuffer(longest, np.uint8))

    def make(self, starts: NDArray[np.int64]) -> Batch:
        """The windows that begin at these positions; every letter has a label."""
        windows = self.letters[starts[:, None] + np.arange(self.length)]
        return as_tensors(recall_batch(windows, windows >= FIRST_LETTER, starts))

    def batch(self, step: int, seed: int) -> Batch:
        """The windows of a training step."""
        border = int(len(self.letters) * (1 - HELD_OUT))
        drawn = np.random.default_rng((seed, step))
        return self.make(drawn.integers(0, border - self.length, self.windows))

    def probe(self) -> Batch:
        """Held-out windows, spread evenly."""
        border = int(len(self.letters) * (1 - HELD_OUT))
        return self.make(np.linspace(border, len(self.letters) - self.length, PROBES).astype(np.int64))


def run(name: str, task: Task, size: Size, budget: Budget) -> dict[str, Any]:
    """Train one model.

    Returns:
        A row of the table: `bits` per held-out letter, `by_context` {letters read: bits of the LAST of them}, and the
        curve.
    """
    tokens, labels = task.probe()

    def evaluate(model: Reformer) -> dict[str, float]:
        return {"bits": float(bits(model, tokens, labels)[labels != -100].mean())}

    config = build(name, size, task.length)
    model, curve = train(config, lambda step: task.batch(step, budget.seed), evaluate, budget)
    model.eval()
    with torch.no_grad():
        contexts = by_context(model, tokens, labels)
    return {
        "model": name,
        "bits": round(curve.rows[-1]["bits"], 4),
        "by_context": contexts,
        **summary(curve),
    }


def by_context(model: Reformer, tokens: Tensor, labels: Tensor) -> dict[int, float]:
    """Bits per letter of the LAST letters of every window, by the number of letters at its end that are read."""
    found, length = {}, LEAST_CONTEXT
    while length <= tokens.shape[1]:
        costs = bits(model, tokens[:, -length:], labels[:, -length:])[:, -LAST:]
        found[length] = round(float(costs[labels[:, -LAST:] != -100].mean()), 4)
        length *= 2
    return found
