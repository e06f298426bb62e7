"""Turns the bytes of windows into the tensors of a batch: a table look-up, and for masked bases a choice of positions.

There are two objectives: predict every next base (`causal_batch`), or masked bases (`masked_batch`). For both, the
number of labels of a window follows from its number of letters.

A batch has one byte per token until it is on the device (`Batch.widened`), because a loader spends its time on memory
traffic and copies to the device. For the next base, tokens and labels are views of one array, shifted by one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megabase.datamodules.alphabet import BOS, FIRST_LETTER, MASK, PAD, Alphabet, Codes
from megabase.datamodules.order.hashing import counted, mix, uniform

IGNORE = -100
FILLER = -1

HIDDEN, REPLACED = 0.8, 0.1
"""Of the bases to predict, the fractions that become `MASK` and a random letter; the rest stay (Devlin et al. 2019,
BERT, section 3.1)."""


class Wide(NamedTuple):
    """The tensors that a model takes.

    Attributes:
        tokens: (batch, length) int64.
        labels: (batch, length) int64, -100 for no label.
        weights: (batch, length) fp32, weight of each label in the loss; None: all weigh 1.
    """

    tokens: Tensor
    labels: Tensor
    weights: Tensor | None


class Batch(NamedTuple):
    """One micro batch. A named tuple, which torch and Lightning pin, move and send between processes unchanged.

    Attributes:
        codes: tokens as uint8 or int16: (batch, length + 1) [bos, b0 .. b(L-1)] to predict the next base, or
            (batch, length) with masked bases.
        hidden: (batch, length) of the same dtype, tokens of the masked bases, `PAD` elsewhere; None to predict the next
            base.
        soft: uint8 of the shape of `codes`, 1 where the label is a lower-case letter; None: all labels weigh 1.
        samples: (batch,) int64 window ids, -1 for filler.
        targets: number of labels in the global batch of this step, over all ranks and micro batches: the sum of all
            losses divided by it is the mean per base. It is computed from the index, so windows that cannot be read
            are counted.
        softmask_weight: weight of lower-case letters in the loss.
        skipped: number of windows that could not be read; they have no labels.
    """

    codes: Tensor
    hidden: Tensor | None
    soft: Tensor | None
    samples: Tensor
    targets: float
    softmask_weight: float = 1.0
    skipped: int = 0

    @property
    def tokens(self) -> Tensor:
        """(batch, length) tokens, a view of `codes`."""
        return self.codes[:, :-1] if self.hidden is None else self.codes

    @property
    def labels(self) -> Tensor:
        """(batch, length) the token that each position must predict, a view. Only letters (5 and above) are labels."""
        return self.codes[:, 1:] if self.hidden is None else self.hidden

    @property
    def lower(self) -> Tensor | None:
        """(batch, length) bool, whether the letter that each position must predict is in lower case; None as `soft`."""
        if self.soft is None:
            return None
        return (self.soft[:, 1:] if self.hidden is None else self.soft).bool()

    def cut(self, start: int, end: int) -> "Batch":
        """The positions [start, end) of every window, in memory of their own."""
        codes = slice(start, end + 1 if self.hidden is None else end)
        return self._replace(
            codes=self.codes[:, codes].clone(),
            hidden=None if self.hidden is None else self.hidden[:, start:end].clone(),
            soft=None if self.soft is None else self.soft[:, codes].clone(),
        )

    def widened(self) -> Wide:
        """The tensors that a model takes, on the device of the batch."""
        labels = self.labels.long()
        labels = labels.masked_fill(labels < FIRST_LETTER, IGNORE)
        weights = None
        if (lower := self.lower) is not None:
            weights = torch.ones_like(lower, dtype=torch.float32).masked_fill(lower, self.softmask_weight)
        return Wide(self.tokens.long(), labels, weights)


class Special(NamedTuple):
    """Positions [start, end) of the window in `slot` hold `token`, a separator or padding."""

    slot: int
    start: int
    end: int
    token: int


@dataclass(frozen=True, eq=False)
class Raw:
    """Windows as they were read.

    Attributes:
        bases: (batch, 1 + length) uint8; 0 in the first column, which is for bos, and where there is no base.
        samples: (batch,) int64 window ids.
        blank: (batch,) bool, slots without a window: filler, or a window that could not be read.
        specials: separators and padding.
        skipped: number of windows that could not be read.
    """

    bases: NDArray[np.uint8]
    samples: NDArray[np.int64]
    blank: NDArray[np.bool_]
    specials: Sequence[Special] = ()
    skipped: int = 0


def causal_batch(raw: Raw, alphabet: Alphabet, targets: int, softmask_weight: float = 1.0) -> Batch:
    """The batch for predicting the next base: tokens [bos, b0 .. b(L-2)], labels [b0 .. b(L-1)].

    A base that is not a letter is not a label. A blank slot holds bos, padding and no labels.

    Args:
        raw: the windows.
        alphabet: encodes them.
        targets: see `Batch`.
        softmask_weight: weight of lower-case letters in the loss.
    """
    codes = _encoded(raw, alphabet)
    return _batch(raw, codes, None, _soft(raw.bases, alphabet, softmask_weight), targets, softmask_weight)


def masked_batch(
    raw: Raw,
    alphabet: Alphabet,
    targets: int,
    softmask_weight: float = 1.0,
    *,
    keys: NDArray[np.uint64],
    rate: float,
) -> Batch:
    """The batch for predicting masked bases.

    `masked_count` letters of a window are labels. Of these, the fraction HIDDEN becomes `MASK`, REPLACED a random
    letter, and the rest stay. The choice is a function of the window's key. A base that is not a letter is never
    chosen. A blank slot holds padding and no labels.

    Args:
        raw: the windows.
        alphabet: encodes them.
        targets: see `Batch`.
        softmask_weight: weight of lower-case letters in the loss.
        keys: (batch,) see `hashing.visit_keys`.
        rate: fraction of the letters to predict, in (0, 1].
    """
    codes = _encoded(raw, alphabet)[:, 1:].copy()
    hidden: Codes = np.full_like(codes, PAD)
    for shown, label, key in zip(codes, hidden, keys, strict=True):
        letters = np.flatnonzero(shown >= FIRST_LETTER)
        count = int(masked_count(letters.size, rate))
        if not count:
            continue
        drawn = counted(key, letters)
        least = np.argpartition(drawn, count - 1)[:count]
        chosen, drawn = letters[least], mix(drawn[least])
        label[chosen] = shown[chosen]
        fate = uniform(drawn)
        replaced = fate < HIDDEN + REPLACED
        drawn = mix(drawn[replaced])
        shown[chosen[replaced]] = FIRST_LETTER + (drawn % np.uint64(len(alphabet.letters))).astype(
            codes.dtype
        )
        shown[chosen[fate < HIDDEN]] = MASK
    soft = _soft(raw.bases[:, 1:], alphabet, softmask_weight)
    return _batch(raw, codes, hidden, soft, targets, softmask_weight)


def masked_count(letters: int | NDArray[np.int64], rate: float) -> NDArray[np.int64]:
    """Number of letters that `masked_batch` chooses in a window with `letters` of them: rate · letters, at least 1."""
    return np.minimum(letters, np.maximum(np.rint(np.multiply(letters, rate)), 1)).astype(np.int64)


def _encoded(raw: Raw, alphabet: Alphabet) -> Codes:
    """(batch, 1 + length) tokens, bos first."""
    codes = alphabet.encode(raw.bases)
    for slot, start, end, token in raw.specials:
        codes[slot, 1 + start : 1 + end] = token
    codes[raw.blank] = PAD
    codes[:, 0] = BOS
    return codes


def _soft(bases: NDArray[np.uint8], alphabet: Alphabet, weight: float) -> NDArray[np.uint8] | None:
    return None if weight == 1 else alphabet.soft_masked(bases)


def _batch(
    raw: Raw,
    codes: Codes,
    hidden: Codes | None,
    soft: NDArray[np.uint8] | None,
    targets: int,
    softmask_weight: float,
) -> Batch:
    return Batch(
        torch.from_numpy(codes),
        None if hidden is None else torch.from_numpy(hidden),
        None if soft is None else torch.from_numpy(soft),
        torch.from_numpy(raw.samples),
        float(targets),
        softmask_weight,
        raw.skipped,
    )
