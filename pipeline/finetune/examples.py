"""Labelled sequences: read from a table or from a folder, with the split of each, and what is to be predicted."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megabase.datamodules.alphabet import FIRST_LETTER, Alphabet
from megabase.datamodules.index.segments import TEST, TRAIN, VALID
from megabase.pipeline.errors import UserError
from megabase.pipeline.finetune.tables import Table

logger = logging.getLogger(__name__)

CLASSIFICATION, REGRESSION, AUTO = "classification", "regression", "auto"
SPLITS = (TRAIN, VALID, TEST)
SPELLINGS = {TRAIN: TRAIN, VALID: VALID, "val": VALID, "validation": VALID, "dev": VALID, TEST: TEST}
MOST_CLASSES = 20
"""With AUTO, whole numbers of more than so many different values are not classes."""


@dataclass(frozen=True)
class Problem:
    """What is to be predicted.

    Attributes:
        classes: names of the classes, in the order of their numbers; empty: a number is to be predicted.
        per_base: for every base, not for the sequence.
        mean, scale: of the numbers in the training split; the model predicts (number − mean) / scale.
    """

    classes: tuple[str, ...]
    per_base: bool = False
    mean: float = 0.0
    scale: float = 1.0

    @property
    def outputs(self) -> int:
        """Numbers that the head returns for each example or base."""
        return len(self.classes) or 1

    @property
    def name(self) -> str:
        """Classification or regression."""
        return CLASSIFICATION if self.classes else REGRESSION


@dataclass(frozen=True, eq=False)
class Examples:
    """Labelled sequences.

    Attributes:
        problem: what is to be predicted.
        names: where each comes from, unique: `row 7` of a table, `train/coding.fa: record-3` of a folder.
        sequences: their letters.
        labels: (n,) fp64, class numbers or numbers; per base: one array (length,) for each example, NaN for no label.
        splits: TRAIN, VALID or TEST of each.
    """

    problem: Problem
    names: list[str]
    sequences: list[bytes]
    labels: Sequence[Any] | NDArray[np.float64]
    splits: list[str]

    def __len__(self) -> int:
        return len(self.names)

    def of(self, split: str) -> NDArray[np.int64]:
        """Numbers of the examples of a split, in order."""
        return np.flatnonzero([each == split for each in self.splits]).astype(np.int64)

    @property
    def longest(self) -> int:
        """Number of the longest example."""
        return int(np.argmax([len(sequence) for sequence in self.sequences]))

    @property
    def identity(self) -> str:
        """A checksum of sequences, labels and splits, in order."""
        found = hashlib.sha256(repr((self.problem.classes, self.problem.per_base)).encode())
        for sequence, label, split in zip(self.sequences, self.labels, self.splits, strict=True):
            found.update(b"%d %s " % (len(sequence), split.encode()))
            found.update(sequence)
            found.update(np.asarray(label, np.float64).tobytes())
        return found.hexdigest()[:32]  # MLflow takes 36 characters of a digest


def labelled(table: Table, task: str, source: Path) -> tuple[Problem, NDArray[np.float64]]:
    """What the labels of a table mean, and each as a number. `mean` and `scale` are not set yet.

    Args:
        table: with labels.
        task: CLASSIFICATION, REGRESSION or AUTO: numbers that are not whole, or of many values, are to be predicted as
            numbers; all else are classes.
        source: the table, for messages.

    Raises:
        UserError: a label is empty, or no number where one is needed, or there is one class only.
    """
    numbers = [_number(text) for text in table.labels]
    if task == AUTO:
        known = [number for number in numbers if number is not None]
        whole = all(number.is_integer() for number in known)
        all_numbers = len(known) == len(numbers)
        task = REGRESSION if all_numbers and not (whole and len({*known}) <= MOST_CLASSES) else CLASSIFICATION
        logger.info(f"{source}: the labels are taken as {task}; --task names another")
    for name, text, number in zip(table.names, table.labels, numbers, strict=True):
        if not text:
            raise UserError(f"{source}: {name}: the label is empty")
        if task == REGRESSION and number is None:
            raise UserError(
                f"{source}: {name}: the label {text!r} is not a number: correct it, or take --task classification"
            )
    if task == REGRESSION:
        return Problem(()), np.array(numbers, np.float64)
    return _classes(table.labels, source)


def _classes(labels: Sequence[str], source: Path) -> tuple[Problem, NDArray[np.float64]]:
    # Numbers in their own order: 2 comes before 10.
    names = sorted({*labels}, key=lambda text: (_number(text) is None, _number(text) or 0.0, text))
    if len(names) < 2:
        raise UserError(f"{source}: every label is {names[0]!r}: a classification needs two classes or more")
    place = {name: number for number, name in enumerate(names)}
    return Problem(tuple(names)), np.array([place[text] for text in labels], np.float64)


def _number(text: str) -> float | None:
    """The finite number that a text is; None if it is none."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def check_letters(sequences: Sequence[bytes], alphabet: Alphabet, source: Path) -> None:
    """Warn of letters outside the alphabet, with their number: the model reads them as unknown."""
    joined = np.frombuffer(b"".join(sequences), np.uint8)
    other = joined[alphabet.encode(joined) < FIRST_LETTER]
    if not other.size:
        return
    kinds = "".join(sorted({chr(each) for each in np.unique(other).tolist()}))
    logger.warning(
        f"{source}: {other.size:,} of {joined.size:,} letters ({kinds!r}) are not {alphabet.in_words}: the model reads"
        " them as unknown"
    )
