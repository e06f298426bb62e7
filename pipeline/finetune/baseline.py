"""The baseline that a fine-tuned model must beat: linear models of k-mer frequencies, by scikit-learn."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megabase.datamodules.alphabet import Alphabet
from megabase.datamodules.index.segments import TEST, TRAIN, VALID
from megabase.pipeline.finetune.examples import Examples
from megabase.pipeline.finetune.extras import require

SIZES = {"dna": (2, 4, 6), "protein": (1, 2), "bytes": (1, 2)}
STRENGTHS = (0.01, 0.1, 1.0, 10.0)
"""Inverse strengths of the penalty."""


@dataclass(frozen=True, eq=False)
class Baseline:
    """A fitted baseline on the test split.

    Attributes:
        name: what it is, with what was chosen on the validation split.
        found: (n, outputs) its predictions, as those of the model.
    """

    name: str
    found: NDArray[np.float64]


def kmer_baseline(examples: Examples, alphabet: Alphabet) -> Baseline:
    """Logistic or ridge regression on k-mer frequencies; k and the penalty have the best score on the validation split.

    Raises:
        UserError: scikit-learn is not installed.
    """
    text, pre, pipeline, linear = (
        require(f"sklearn.{name}")
        for name in ("feature_extraction.text", "preprocessing", "pipeline", "linear_model")
    )
    letters = [sequence.decode("latin-1") for sequence in examples.sequences]
    if alphabet.soft is not None:
        letters = [each.upper() for each in letters]
    rows = {split: examples.of(split) for split in (TRAIN, VALID, TEST)}
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
    if not examples.problem.classes:
        return Baseline(name, fitted.predict(texts[TEST])[:, None])
    found = np.zeros((len(rows[TEST]), examples.problem.outputs))
    found[:, fitted.classes_.astype(np.int64)] = fitted.predict_proba(texts[TEST])
    return Baseline(name, found)
