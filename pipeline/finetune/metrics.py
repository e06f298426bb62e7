"""What predictions are worth: metrics with bootstrap intervals.

Examples are drawn with replacement RESAMPLES times, always the same ones (of single bases: their windows,
RESAMPLES_OF_BASES times); an interval is the middle CONFIDENCE of the
values (Efron & Tibshirani 1993, percentile intervals).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from megabase.pipeline.finetune.examples import Problem

RESAMPLES, RESAMPLES_OF_BASES = 1000, 100
MOST_BASES = 1_000_000
"""Labelled bases, spread evenly over the test split, that metrics of single bases are computed of."""
CONFIDENCE = 0.95
_SEED = 0

Metric = Callable[[NDArray[np.float64], NDArray[np.float64]], float]


@dataclass(frozen=True)
class Estimate:
    """A value, and the ends of its interval; NaN where it is not defined."""

    value: float
    low: float
    high: float


def accuracy(labels: NDArray[np.float64], probabilities: NDArray[np.float64]) -> float:
    """Fraction of the labels (n,) that have the highest of the probabilities (n, classes)."""
    return float((probabilities.argmax(axis=1) == labels).mean())


def mcc(labels: NDArray[np.float64], probabilities: NDArray[np.float64]) -> float:
    """Matthews' correlation coefficient, for any number of classes (Gorodkin 2004); 0 if it is not defined."""
    classes = probabilities.shape[1]
    pairs = labels.astype(np.int64) * classes + probabilities.argmax(axis=1)
    table = np.bincount(pairs, minlength=classes**2).reshape(classes, classes).astype(np.float64)
    total, right = table.sum(), np.trace(table)
    true, guessed = table.sum(axis=1), table.sum(axis=0)
    below = math.sqrt((total**2 - guessed @ guessed) * (total**2 - true @ true))
    return float((right * total - true @ guessed) / below) if below else 0.0


def auroc(labels: NDArray[np.float64], probabilities: NDArray[np.float64]) -> float:
    """Area under the ROC curve; for more than two classes the mean of each against all others.

    NaN if a class has no label, or all labels.
    """
    classes = range(1, 2) if probabilities.shape[1] == 2 else range(probabilities.shape[1])
    return float(np.mean([_auroc(labels == each, probabilities[:, each]) for each in classes]))


def _auroc(positive: NDArray[np.bool_], scores: NDArray[np.float64]) -> float:
    """The probability that a positive scores higher than a negative (Mann & Whitney), ties counting half."""
    many = int(positive.sum())
    others = len(positive) - many
    if not many or not others:
        return math.nan
    ranks = rankdata(scores)[positive].sum()
    return float((ranks - many * (many + 1) / 2) / (many * others))


def pearson(labels: NDArray[np.float64], found: NDArray[np.float64]) -> float:
    """Correlation of numbers (n,) with predictions (n, 1) or (n,); NaN if either is constant."""
    x, y = labels - labels.mean(), found.ravel() - found.mean()
    below = math.sqrt(float(x @ x) * float(y @ y))
    return float(x @ y) / below if below else math.nan


def spearman(labels: NDArray[np.float64], found: NDArray[np.float64]) -> float:
    """Correlation of the ranks."""
    return pearson(rankdata(labels), rankdata(found.ravel()))


def r2(labels: NDArray[np.float64], found: NDArray[np.float64]) -> float:
    """Coefficient of determination: 1 − squared errors / squared deviations from the mean; NaN for equal labels."""
    below = float(np.square(labels - labels.mean()).sum())
    return 1 - float(np.square(labels - found.ravel()).sum()) / below if below else math.nan


def metrics_of(problem: Problem) -> dict[str, Metric]:
    """The metrics of a problem by name, the most important one first."""
    if problem.classes:
        return {"accuracy": accuracy, "auroc": auroc, "mcc": mcc}
    return {"pearson": pearson, "spearman": spearman, "r2": r2}


def estimates(
    problem: Problem,
    labels: NDArray[np.float64],
    found: NDArray[np.float64],
    groups: NDArray[np.int64] | None = None,
) -> dict[str, Estimate]:
    """Every metric with its interval.

    Args:
        problem: what was predicted.
        labels: (n,).
        found: (n, outputs) predictions.
        groups: (n,) what is drawn together, rising: the windows of bases; None: every label by itself.
    """
    metrics = metrics_of(problem)
    starts = np.arange(len(labels)) if groups is None else np.flatnonzero(np.diff(groups, prepend=-1))
    ends = np.append(starts[1:], len(labels))
    drawn = np.random.default_rng(_SEED)
    values: dict[str, list[float]] = {name: [] for name in metrics}
    for _ in range(RESAMPLES if groups is None else RESAMPLES_OF_BASES):
        chosen = drawn.integers(0, len(starts), len(starts))
        rows = chosen
        if groups is not None:
            rows = np.concatenate([np.arange(starts[each], ends[each]) for each in chosen])
        for name, metric in metrics.items():
            values[name].append(metric(labels[rows], found[rows]))
    return {name: _estimate(metric(labels, found), values[name]) for name, metric in metrics.items()}


def _estimate(value: float, drawn: list[float]) -> Estimate:
    known = [each for each in drawn if math.isfinite(each)]
    if not known:
        return Estimate(value, math.nan, math.nan)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(known, [tail, 1 - tail])
    return Estimate(value, float(low), float(high))
