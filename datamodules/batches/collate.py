"""Bytes of windows to the tensors of a batch: one table look-up, and for masked bases the choice of them.

Two objectives: predict every next base (`causal_batch`), or bases that are masked (`masked_batch`). Both know how many
labels a window has from its number of letters alone.

A batch is kept narrow, one byte a token, until it is on the device (`Batch.widened`): memory traffic and copies to the
device are what a loader spends. For the next base, tokens and labels are the same array, one place apart.
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
"""Of the bases to predict, the parts that become `MASK` and a random letter; the rest stay (Devlin et al. 2019, BERT,
section 3.1)."""


class Wide(NamedTuple):
    """What a model takes.

    tokens: (batch, length) int64. labels: (batch, length) int64, -100 for none. weights: (batch, length) fp32 of the
    labels in the loss, or None: 1 everywhere.
    """

    tokens: Tensor
    labels: Tensor
    weights: Tensor | None


class Batch(NamedTuple):
    """One micro batch (a named tuple, so that it is pinned, moved and sent between processes as it is).

    codes: narrow tokens, uint8 or int16: (batch, length + 1) [bos, b0 .. b(L-1)] to predict the next base, or
        (batch, length) with bases masked.
    hidden: (batch, length) narrow, the tokens of masked bases, `PAD` elsewhere. None: every next base is to be
        predicted.
    soft: uint8 of the shape of `codes`, 1 where the label is a soft-masked letter; None: all weigh the same.
    samples: (batch,) int64 window ids, -1 for filler.
    targets: number of labels in the whole global batch of this step, over all ranks and micro batches; a sum of losses
        divided by it is the mean per base. Known from the index: windows that could not be read are counted.
    softmask_weight: what soft-masked letters weigh. skipped: windows that could not be read: they have no labels.
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
        """(batch, length) narrow, a view."""
        return self.codes[:, :-1] if self.hidden is None else self.codes

    @property
    def labels(self) -> Tensor:
        """(batch, length) narrow, a view: the token each position must predict. What is no letter is no label."""
        return self.codes[:, 1:] if self.hidden is None else self.hidden

    def widened(self) -> Wide:
        """The batch as a model takes it, on the device where it lies."""
        labels = self.labels.long()
        labels = labels.masked_fill(labels < FIRST_LETTER, IGNORE)
        weights = None
        if self.soft is not None:
            soft = self.soft[:, 1:] if self.hidden is None else self.soft
            weights = torch.ones_like(soft, dtype=torch.float32).masked_fill(
                soft.bool(), self.softmask_weight
            )
        return Wide(self.tokens.long(), labels, weights)


class Special(NamedTuple):
    """Positions [start, end) of the window in `slot` hold `token`, which is no base."""

    slot: int
    start: int
    end: int
    token: int


@dataclass(frozen=True, eq=False)
class Raw:
    """Windows as they were read.

    bases: (batch, 1 + length) uint8; the first column is room for bos, and 0 like all that is no base.
    samples: (batch,) int64 window ids. specials: separators and padding. blank: (batch,) bool, slots without a window.
    skipped: how many of these could not be read.
    """

    bases: NDArray[np.uint8]
    samples: NDArray[np.int64]
    blank: NDArray[np.bool_]
    specials: Sequence[Special] = ()
    skipped: int = 0


def causal_batch(raw: Raw, alphabet: Alphabet, targets: int, softmask_weight: float = 1.0) -> Batch:
    """The batch for predicting the next base.

    tokens = [bos, b0 .. b(L-2)], labels = [b0 .. b(L-1)]; a base that is no letter is no label. A blank slot is bos,
    padding and no labels. `targets`: see `Batch`.
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

    tokens are the bases; of the letters of a window, `masked_count` are labels: most of them show as `MASK`, some as
    a random letter, some as they are (HIDDEN, REPLACED). Which and how is a function of the window's key. What is
    no letter is never chosen. A blank slot is padding and no labels. `targets`: see `Batch`.

    keys: (batch,), see `hashing.visit_keys`. rate: share of the letters to predict, in (0, 1].
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
    """How many letters `masked_batch` chooses in windows of so many: rate · letters, rounded, and at least one."""
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
