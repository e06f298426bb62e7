"""Metrics are those of scikit-learn and scipy; intervals hold what they should; the baseline learns."""

import math

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as reference

from megabase.datamodules.alphabet import Alphabet
from megabase.pipeline.finetune import baseline as module
from megabase.pipeline.finetune import metrics
from megabase.pipeline.finetune.baseline import kmer_baseline
from megabase.pipeline.finetune.examples import Examples, Problem
from tests.pipeline.finetune.conftest import random_rows

RANDOM = np.random.default_rng(0)


@pytest.mark.parametrize("classes", [2, 4])
def test_metrics_of_classes_are_those_of_scikit_learn(classes: int) -> None:
    labels = RANDOM.integers(0, classes, 300).astype(float)
    found = RANDOM.dirichlet(np.ones(classes), 300).round(2)  # with ties
    found = (found + 0.1 * np.eye(classes)[labels.astype(int)]).round(2)
    found /= found.sum(axis=1, keepdims=True)
    guess = found.argmax(axis=1)
    scores = found[:, 1] if classes == 2 else found
    assert metrics.accuracy(labels, found) == reference.accuracy_score(labels, guess)
    assert metrics.mcc(labels, found) == pytest.approx(reference.matthews_corrcoef(labels, guess))
    assert metrics.auroc(labels, found) == pytest.approx(
        reference.roc_auc_score(labels, scores, multi_class="ovr")
    )


def test_metrics_of_numbers_are_those_of_scipy_and_scikit_learn() -> None:
    labels = RANDOM.normal(size=200).round(1)
    found = (labels + RANDOM.normal(size=200))[:, None]
    assert metrics.pearson(labels, found) == pytest.approx(stats.pearsonr(labels, found[:, 0])[0])
    assert metrics.spearman(labels, found) == pytest.approx(stats.spearmanr(labels, found[:, 0])[0])
    assert metrics.r2(labels, found) == pytest.approx(reference.r2_score(labels, found[:, 0]))


def test_what_is_not_defined_is_nan() -> None:
    same, found = np.zeros(5), np.full((5, 2), 0.5)
    assert math.isnan(metrics.auroc(same, found)) and metrics.mcc(same, found) == 0
    assert math.isnan(metrics.pearson(same, found[:, :1])) and math.isnan(metrics.r2(same, found[:, :1]))


def test_an_interval_is_that_of_the_binomial() -> None:
    labels = np.zeros(400)
    found = np.array([[1.0, 0.0]] * 300 + [[0.0, 1.0]] * 100)
    estimate = metrics.estimates(Problem(("a", "b")), labels, found)["accuracy"]
    deviation = 1.96 * math.sqrt(0.75 * 0.25 / 400)
    assert estimate.value == 0.75
    assert estimate.low == pytest.approx(0.75 - deviation, abs=0.01)
    assert estimate.high == pytest.approx(0.75 + deviation, abs=0.01)
    assert metrics.estimates(Problem(("a", "b")), labels, found)["accuracy"] == estimate
    # Windows drawn together: two groups of equal labels leave two values and their mean.
    groups = np.repeat([0, 1], [300, 100])
    grouped = metrics.estimates(Problem(("a", "b")), labels, found, groups)["accuracy"]
    assert (grouped.low, grouped.high) == (0.0, 1.0)


@pytest.mark.parametrize("classes", [("at", "gc"), ()])
def test_the_baseline_finds_composition(classes: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STRENGTHS", (1.0,))
    monkeypatch.setitem(module.SIZES, "dna", (2,))
    rows = random_rows(80)
    splits = ["train"] * 50 + ["valid"] * 10 + ["test"] * 20
    labels = np.array([float(label == "gc") for _, label in rows])
    examples = Examples(
        Problem(classes),
        [str(n) for n in range(80)],
        [letters.encode() for letters, _ in rows],
        labels,
        splits,
    )
    found = kmer_baseline(examples, Alphabet.named("dna"))
    right = metrics.accuracy if classes else metrics.pearson
    assert right(labels[60:], found.found) > 0.8
    assert found.name == f"2-mers, {'logistic' if classes else 'ridge'} regression, C=1"
