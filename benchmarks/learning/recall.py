"""Recall of random DNA: in every window, a stretch of random bases comes again after a random gap.

Only a model that finds the first occurrence can predict the second one better than 2 bits per base. Counts the steps
until the copy costs 0.1 bits per base, and says what it costs at the end by distance, exact, changed and inverted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.learning.models import Size, build
from benchmarks.learning.training import Batch, Budget, Curve, bits, train
from megabase.datamodules.alphabet import Alphabet
from megabase.datamodules.batches.collate import Batch as Windows
from megabase.datamodules.report.recall import (
    Source,
    distances,
    planted,
    random_windows,
    recall_batch,
    scored,
)
from megabase.models import Reformer

DNA = Alphabet.named("dna")
LEARNED = 0.1
"""Bits per base on the copy at which a model has learned to recall."""

TEST_SEED = 1 << 20
"""Seed of the windows that are evaluated; the training uses other seeds."""

PROBES = 8
"""Windows of one figure."""


@dataclass(frozen=True)
class Task:
    """Windows with a copy.

    Attributes:
        length: of a window.
        copy: bases of a copy.
        changed: share of a copy's bases that differ from its source, while training.
        inverted: the source is the reverse complement, in half of the windows, while training.
        masked: share of the bases that are masked, and predicted from both sides; None: the next base is predicted.
        tokens: of a step, whatever the length.
    """

    length: int
    copy: int = 192
    changed: float = 0.0
    inverted: bool = False
    masked: float | None = None
    tokens: int = 8192

    def windows(self, step: int, seed: int) -> NDArray[Any]:
        """Training windows (tokens / length, length): a function of (seed, step)."""
        count = max(1, self.tokens // self.length)
        samples = np.arange(step * count, (step + 1) * count)
        drawn = np.random.default_rng((seed, step))
        ends = drawn.integers(2 * self.copy, self.length + 1, count)
        gaps = drawn.integers(0, ends - 2 * self.copy + 1)
        windows = random_windows(DNA, self.length, seed, samples)
        source = Source(self.copy, self.changed)
        whole = planted(windows, DNA, source, gaps, ends, seed=seed, samples=samples)
        if not self.inverted:
            return whole
        turned = planted(windows, DNA, replace(source, inverted=True), gaps, ends, seed=seed, samples=samples)
        return np.where(samples[:, None] % 2 == 0, whole, turned)

    def batch(self, step: int, seed: int) -> Batch:
        """The windows of a step as tokens and labels."""
        windows = self.windows(step, seed)
        every = np.ones(windows.shape, bool)
        samples = np.arange(step * len(windows), (step + 1) * len(windows))
        return as_tensors(recall_batch(windows, every, samples, mask_rate=self.masked, seed=seed))

    def probe(self, gap: int, *, changed: float = 0.0, inverted: bool = False) -> Batch:
        """Windows whose last bases are the copy of a source that ends `gap` bases before; only the copy has labels."""
        samples = np.arange(PROBES)
        windows = random_windows(DNA, self.length, TEST_SEED, samples)
        labels = scored(windows, self.copy)
        source = Source(self.copy, changed, inverted)
        gaps = np.full(PROBES, gap)
        windows = planted(windows, DNA, source, gaps, seed=TEST_SEED, samples=samples)
        return as_tensors(recall_batch(windows, labels, samples, mask_rate=self.masked))

    def cost(self, model: Reformer, gap: int, **kind: Any) -> float:
        """Bits per base of the copies of a probe."""
        tokens, labels = self.probe(gap, **kind)
        return float(bits(model, tokens, labels)[labels != -100].mean())

    def gaps(self) -> list[int]:
        """The distances that are evaluated."""
        return distances(self.length, self.copy)


def as_tensors(batch: Windows) -> Batch:
    """A batch of the data module as int64 tokens and labels."""
    wide = batch.widened()
    return wide.tokens, wide.labels


def run(name: str, task: Task, size: Size, budget: Budget) -> dict[str, Any]:
    """Train one model until it recalls, or to the end of its budget.

    Returns:
        A row of the table: `steps` until LEARNED (None: never), `by_distance` {bases: bits per base} at the end,
        `changed` (3 % of the bases) and `inverted` at the middle distance, and the curve.
    """
    gaps = task.gaps()
    middle = gaps[len(gaps) // 2]

    def evaluate(model: Reformer) -> dict[str, float]:
        return {"copy": task.cost(model, middle)}

    below: list[bool] = []

    def done(row: dict[str, float]) -> bool:
        below.append(row["copy"] <= LEARNED / 2)
        return sum(below) >= 2

    config = replace(build(name, size, task.length), causal=task.masked is None)
    model, curve = train(config, lambda step: task.batch(step, budget.seed), evaluate, budget, done)
    model.eval()
    with torch.no_grad():
        return {
            "model": name,
            "steps": curve.first("copy", LEARNED),
            "by_distance": {gap: round(task.cost(model, gap), 3) for gap in gaps},
            "changed": round(task.cost(model, middle, changed=0.03), 3),
            "inverted": round(task.cost(model, middle, inverted=True), 3),
            "best": round(min(row["copy"] for row in curve.rows), 3),
            **summary(curve),
        }


def summary(curve: Curve) -> dict[str, Any]:
    """What every table records of a training."""
    last = curve.rows[-1]
    return {
        "trained_steps": int(last["step"]),
        "parameters": curve.parameters,
        "tokens_per_step": curve.tokens,
        "seconds": round(curve.seconds, 3),
        "curve": [{key: round(value, 4) for key, value in row.items()} for row in curve.rows],
    }
