"""The baseline that a fine-tuned model must beat: linear models of k-mer frequencies, by scikit-learn."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megabase.datamodules.alphabet import Alphabet
from megabase.datamodules.index.segments import TEST, TRAIN, VALID
from megabase.pipeline.finetune.bases import neighbourhoods
from megabase.pipeline.finetune.examples import Examples
from megabase.pipeline.finetune.extras import require

logger = logging.getLogger(__name__)

SIZES = {"dna": (2, 4, 6), "protein": (1, 2), "bytes": (1, 2)}
STRENGTHS = (0.01, 0.1, 1.0, 10.0)
"""Inverse strengths of the penalty."""
WIDTHS = (7, 15)
"""Letters around a base, itself in the middle."""
MOST_FITTED = 100_000
"""Examples or bases of the training split, spread over it, that a baseline is fitted on."""


@dataclass(frozen=True, eq=False)
class Baseline:
    """A fitted baseline on the test split.

    Attributes:
        name: what it is, with what was chosen on the validation split.
        found: (n, outputs) its predictions, as those of the model.
    """

    name: str
    found: NDArray[np.float64]


def base_baseline(examples: Examples, alphabet: Alphabet) -> Baseline:
    """Logistic or ridge regression on the letters around each base; width and penalty are chosen as for k-mers.

    Returns:
        Predictions of the labelled bases of the test split, one behind the other.

    Raises:
        UserError: scikit-learn is not installed.
    """
    logger.info("fitting the baseline")
    pre, pipeline, linear = (
        require(f"sklearn.{name}") for name in ("preprocessing", "pipeline", "linear_model")
    )
    classes = examples.problem.classes
    rows = {split: examples.of(split) for split in (TRAIN, VALID, TEST)}
    best: tuple[float, int, float, Any] | None = None
    for width in WIDTHS:
        x, y, _ = neighbourhoods(examples, alphabet, rows[TRAIN], width, MOST_FITTED)
        valid_x, valid_y, _ = neighbourhoods(examples, alphabet, rows[VALID], width, MOST_FITTED)
        for strength in STRENGTHS:
            model = (
                linear.LogisticRegression(C=strength, max_iter=100) if classes else linear.Ridge(1 / strength)
            )
            fitted = pipeline.make_pipeline(pre.OneHotEncoder(handle_unknown="ignore"), model)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                fitted.fit(x, y)
            score = float(fitted.score(valid_x, valid_y))
            if best is None or score > best[0]:
                best = (score, width, strength, fitted)
    assert best is not None
    _, width, strength, fitted = best
    x, _, _ = neighbourhoods(examples, alphabet, rows[TEST], width, 0)
    kind = "logistic" if classes else "ridge"
    name = f"{width} letters around each base, {kind} regression, C={strength:g}"
    return Baseline(name, _predicted(fitted, x, examples))


def _predicted(fitted: Any, x: Any, examples: Examples) -> NDArray[np.float64]:
    """(n, outputs) predictions of a fitted model of scikit-learn; probability 0 for a class it has not seen."""
    if not examples.problem.classes:
        return np.asarray(fitted.predict(x), np.float64)[:, None]
    found = np.zeros((np.shape(x)[0], examples.problem.outputs))
    found[:, fitted.classes_.astype(np.int64)] = fitted.predict_proba(x)
    return found


def kmer_baseline(examples: Examples, alphabet: Alphabet) -> Baseline:
    """Logistic or ridge regression on k-mer frequencies; k and the penalty have the best score on the validation split.

    Raises:
        UserError: scikit-learn is not installed.
    """
    logger.info("fitting the baseline")
    text, pre, pipeline, linear = (
        require(f"sklearn.{name}")
        for name in ("feature_extraction.text", "preprocessing", "pipeline", "linear_model")
    )
    letters = [sequence.decode("latin-1") for sequence in examples.sequences]
    if alphabet.soft is not None:
        letters = [each.upper() for each in letters]
    rows = {split: examples.of(split) for split in (TRAIN, VALID, TEST)}
    if len(rows[TRAIN]) > MOST_FITTED:
        rows[TRAIN] = rows[TRAIN][np.arange(MOST_FITTED) * len(rows[TRAIN]) // MOST_FITTED]
    texts = {split: [letters[each] for each in chosen] for split, chosen in rows.items()}
    labels = {split: np.asarray(examples.labels)[chosen] for split, chosen in rows.items()}
    best: tuple[float, str, Any] | None = None
    for k in SIZES[alphabet.name]:
        for strength in STRENGTHS:
            model = linear.Ridge(alpha=1 / strength)
            if examples.problem.classes:
                model = linear.LogisticRegression(C=strength, max_iter=300)
            fitted = pipeline.make_pipeline(
                text.CountVectorizer(analyzer="char", ngram_range=(k, k), lowercase=False, min_df=2),
                pre.Normalizer("l1"),
                pre.StandardScaler(with_mean=False),
                model,
            )
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that it has not converged: the validation split decides
                try:
                    fitted.fit(texts[TRAIN], labels[TRAIN])
                except ValueError:  # no k-mer of this size comes twice
                    continue
                score = float(fitted.score(texts[VALID], labels[VALID]))
            if best is None or score > best[0]:
                kind = "logistic" if examples.problem.classes else "ridge"
                best = (score, f"{k}-mers, {kind} regression, C={strength:g}", fitted)
    if best is None:
        majority = np.bincount(labels[TRAIN].astype(np.int64), minlength=examples.problem.outputs)
        guess = majority / majority.sum() if examples.problem.classes else np.array([labels[TRAIN].mean()])
        return Baseline("the training split's mean", np.tile(guess, (len(rows[TEST]), 1)))
    _, name, fitted = best
    return Baseline(name, _predicted(fitted, texts[TEST], examples))
