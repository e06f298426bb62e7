"""Which example is for training, validation and test: as the source says, and by a draw where it does not.

A draw is a function of the seed and the letters: equal sequences always come into the same split, on both strands.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path

import numpy as np

from megabase.datamodules.alphabet import Alphabet
from megabase.datamodules.index.segments import TEST, TRAIN, VALID
from megabase.pipeline.errors import UserError
from megabase.pipeline.finetune.examples import SPELLINGS, SPLITS
from megabase.pipeline.finetune.tables import Table

logger = logging.getLogger(__name__)

FRACTION = 0.1
"""Of the different sequences, for validation and for test, where the source does not say."""


def split_of_each(table: Table, alphabet: Alphabet, seed: int, source: Path) -> list[str]:
    """The split of each row.

    Without splits, FRACTION of the different sequences is for test and as much for validation. A source with a test
    split, but without a validation split, gives FRACTION of its training split.

    Args:
        table: the rows.
        alphabet: of the sequences.
        seed: of the draw, `run.seed`.
        source: of the rows, for messages.

    Raises:
        UserError: a split has another name than train, valid or test, or no row.
    """
    if table.splits is None:
        splits = drawn(
            [TRAIN] * len(table.names), table.sequences, alphabet, seed, {TEST: FRACTION, VALID: FRACTION}
        )
        _check_none_empty(splits, source)
        return splits
    splits = []
    for name, text in zip(table.names, table.splits, strict=True):
        if text.lower() not in SPELLINGS:
            raise UserError(f"{source}: {name}: unknown split {text!r}: it must be {', '.join(SPLITS)}")
        splits.append(SPELLINGS[text.lower()])
    for needed in (TRAIN, TEST):
        if needed not in splits:
            raise UserError(f"{source}: no example is in the split {needed!r}, which is needed")
    if VALID not in splits:
        splits = drawn(splits, table.sequences, alphabet, seed, {VALID: FRACTION})
        logger.info(f"{source} has no validation split: {splits.count(VALID):,} training examples become it")
    _check_none_empty(splits, source)
    return splits


def drawn(
    splits: Sequence[str],
    sequences: Sequence[bytes],
    alphabet: Alphabet,
    seed: int,
    fractions: dict[str, float],
) -> list[str]:
    """Move fractions of the different sequences of the training split to other splits.

    Args:
        splits: of each sequence.
        sequences: the letters.
        alphabet: of the sequences; case does not tell them apart where it marks repeats.
        seed: of the draw.
        fractions: split -> fraction of the different sequences, at least one of them.
    """
    digests = [_digest(sequence, alphabet, seed) for sequence in sequences]
    order = sorted({digest for digest, split in zip(digests, splits, strict=True) if split == TRAIN})
    chosen: dict[bytes, str] = {}
    start = 0
    for split, fraction in fractions.items():
        count = max(round(len(order) * fraction), 1)
        chosen |= dict.fromkeys(order[start : start + count], split)
        start += count
    return [
        chosen.get(digest, split) if split == TRAIN else split
        for digest, split in zip(digests, splits, strict=True)
    ]


def _digest(sequence: bytes, alphabet: Alphabet, seed: int) -> bytes:
    letters = np.frombuffer(sequence.upper() if alphabet.soft is not None else sequence, np.uint8)
    both = [letters.tobytes()]
    if alphabet.complement is not None:
        both.append(alphabet.reverse_complement(letters).tobytes())
    return blake2b(min(both), digest_size=16, key=str(seed).encode()).digest()


def _check_none_empty(splits: Sequence[str], source: Path) -> None:
    for split in SPLITS:
        if split not in splits:
            raise UserError(
                f"{source}: no example is left for the split {split!r}: give more sequences, or a split column"
            )
