"""Real homology: in every window, a stretch of one genome follows the same stretch of its relative.

A window is sequence of genome A in which the stretch of its relative B (the source) is written, and some thousand bases
later the stretch of A that is homologous to it (the copy). Only a model that finds the source predicts the copy better
than the rest. Training takes stretches of the first nine tenths of A; those that are scored lie in the last tenth.

Without a relative, the source is the copy itself with 3 % of its bases changed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.learning.models import Size, build
from benchmarks.learning.recall import DNA, as_tensors, summary
from benchmarks.learning.training import Batch, Budget, bits, train
from megabase.datamodules.alphabet import FIRST_LETTER
from megabase.datamodules.prepare.records import read_file
from megabase.datamodules.report.recall import WARM_UP, Source, planted, recall_batch, scored
from megabase.models import Reformer

Codes = NDArray[np.uint8]

KMER = 32
"""Bases of an anchor: a stretch that both genomes have once."""

STEP = 256
"""Anchors are looked for at every so many positions of A."""

IDENTITY = 0.9
"""Least share of equal bases of a pair of stretches. Below it, one has an insertion."""

HELD_OUT = 0.1
"""Share of A, at its end, whose stretches are only scored."""

CHANGED = 0.03
TEST_SEED = 1 << 20


def read_genome(path: Path) -> Codes:
    """The longest record of a FASTA file, as tokens."""
    longest = max((record.sequence for record in read_file(path, DNA)), key=len)
    return np.asarray(DNA.encode(np.frombuffer(longest, np.uint8)), np.uint8)


@dataclass(frozen=True)
class Pairs:
    """Homologous stretches of equal length: A[a : a + copy] and B[b : b + copy]."""

    a: NDArray[np.int64]
    b: NDArray[np.int64]


@dataclass(frozen=True)
class Task:
    """Windows in which a stretch follows its relative's.

    Attributes:
        genome: A, tokens.
        relative: B; None: A with CHANGED bases.
        length: of a window.
        copy: bases of a stretch.
        windows: of a step.
    """

    genome: Codes
    relative: Codes | None
    length: int
    copy: int
    windows: int

    @cached_property
    def border(self) -> int:
        """The position of A from which on it is held out."""
        return int(len(self.genome) * (1 - HELD_OUT))

    @cached_property
    def pairs(self) -> tuple[Pairs, Pairs]:
        """The pairs to train with, and the pairs to score: no stretch of B is in both."""
        if self.relative is None:
            starts = np.arange(0, len(self.genome) - self.copy, STEP)
            pairs = Pairs(starts, starts)
        else:
            pairs = _homologous(self.genome, self.relative, self.copy)
        scored_ = pairs.a >= self.border
        trained = pairs.a + self.copy <= self.border
        # Stretches of B that are homologous to held-out ones of A are not trained with.
        near = np.sort(pairs.b[scored_])
        place = np.searchsorted(near, pairs.b)
        distance = np.minimum(
            np.abs(pairs.b - near[np.clip(place, 0, len(near) - 1)]),
            np.abs(pairs.b - near[np.clip(place - 1, 0, len(near) - 1)]),
        )
        trained &= distance >= self.copy
        return tuple(Pairs(pairs.a[which], pairs.b[which]) for which in (trained, scored_))  # type: ignore[return-value]

    def least(self) -> float:
        """Bits per base that the changes between the scored stretches cost at least: h(p) + p log2 3, p their share."""
        if self.relative is None:
            p = CHANGED
        else:
            pairs = self.pairs[1]
            span = np.arange(self.copy)
            p = float((self.genome[pairs.a[:, None] + span] != self.relative[pairs.b[:, None] + span]).mean())
        return -p * math.log2(p / 3) - (1 - p) * math.log2(1 - p)

    def make(self, samples: NDArray[np.int64], seed: int, *, held_out: bool, source: bool = True) -> Batch:
        """Windows by number, whose last bases are the copy: tokens, and labels everywhere (held_out: on the copy).

        Args:
            samples: numbers of the windows; everything in them is a function of (seed, number).
            seed: see above.
            held_out: of the scored pairs, in held-out sequence, or of those to train with.
            source: False leaves the source out.
        """
        pairs = self.pairs[held_out]
        low, high = (self.border, len(self.genome)) if held_out else (0, self.border)
        windows = np.empty((len(samples), self.length), np.uint8)
        for row, sample in enumerate(samples):
            drawn = np.random.default_rng((seed, int(sample)))
            start = drawn.integers(low, high - self.length)
            windows[row] = self.genome[start : start + self.length]
            pair = drawn.integers(len(pairs.a))
            end = self.length if held_out else drawn.integers(2 * self.copy, self.length + 1)
            stretch = self.genome[pairs.a[pair] : pairs.a[pair] + self.copy]
            windows[row, end - self.copy : end] = stretch
            gap = drawn.integers(0, end - 2 * self.copy + 1)
            if not source:
                continue
            if self.relative is not None:
                at = end - 2 * self.copy - gap
                windows[row, at : at + self.copy] = self.relative[pairs.b[pair] : pairs.b[pair] + self.copy]
            else:
                one = slice(row, row + 1)
                gaps, ends = np.array([gap]), np.array([end])
                windows[one] = planted(
                    windows[one], DNA, Source(self.copy, CHANGED), gaps, ends, seed=seed, samples=samples[one]
                )
        labels = scored(windows, self.copy) if held_out else windows >= FIRST_LETTER
        return as_tensors(recall_batch(windows, labels, samples))

    def batch(self, step: int, seed: int) -> Batch:
        """The windows of a training step."""
        return self.make(np.arange(step * self.windows, (step + 1) * self.windows), seed, held_out=False)


def _homologous(a: Codes, b: Codes, copy: int) -> Pairs:
    """Pairs of stretches that begin at a common k-mer and differ by substitutions only."""
    words_b, once = np.unique(_words(b), return_index=True)
    starts = np.arange(0, len(a) - copy, STEP)
    words_a = _words(a)[starts]
    place = np.clip(np.searchsorted(words_b, words_a), 0, len(words_b) - 1)
    found = words_b[place] == words_a
    of_a, of_b = starts[found], once[place[found]]
    inside = of_b <= len(b) - copy
    of_a, of_b = of_a[inside], of_b[inside]
    span = np.arange(copy)
    equal = np.array([(a[x + span] == b[y + span]).mean() for x, y in zip(of_a, of_b, strict=True)])
    good = equal >= IDENTITY
    return Pairs(of_a[good], of_b[good].astype(np.int64))


def _words(codes: Codes) -> NDArray[np.uint64]:
    """The KMER bases from every position on as one number."""
    letters = ((codes.astype(np.int64) - FIRST_LETTER) & 3).astype(np.uint64)
    count = len(codes) - KMER + 1
    words = np.zeros(count, np.uint64)
    for i in range(KMER):
        words = (words << np.uint64(2)) | letters[i : i + count]
    return words


def run(name: str, task: Task, size: Size, budget: Budget, probes: int) -> dict[str, Any]:
    """Train one model, and score `probes` held-out windows.

    Returns:
        A row of the table: bits per base of the copies (`copy`), of the same bases without their source (`alone`), the
        least possible, and the curve.
    """
    numbers = np.arange(probes)
    tokens, labels = task.make(numbers, TEST_SEED, held_out=True)
    without, same = task.make(numbers, TEST_SEED, held_out=True, source=False)

    def cost(model: Reformer, tokens: torch.Tensor, labels: torch.Tensor) -> float:
        return float(bits(model, tokens, labels)[labels != -100].mean())

    config = build(name, size, task.length)
    model, curve = train(
        config,
        lambda step: task.batch(step, budget.seed),
        lambda model: {"copy": cost(model, tokens, labels)},
        budget,
    )
    model.eval()
    with torch.no_grad():
        alone = cost(model, without, same)
    return {
        "model": name,
        "copy": round(curve.rows[-1]["copy"], 4),
        "alone": round(alone, 4),
        "least": round(task.least(), 4),
        "scored_from": WARM_UP,
        **summary(curve),
    }
