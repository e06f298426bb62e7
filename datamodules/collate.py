"""Bytes of windows to the tensors of a batch: one table look-up, and for masked bases the choice of them.

Two objectives: predict every next base (`causal_batch`), or bases that are masked (`masked_batch`). Both know how many
labels a window has from its number of letters alone.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from datamodules.alphabet import BOS, FIRST_LETTER, MASK, PAD, Alphabet
from datamodules.hashing import counted, mix

IGNORE = -100
FILLER = -1

HIDDEN, REPLACED = 0.8, 0.1
"""Of the bases to predict, the parts that become `MASK` and a random letter; the rest stay (Devlin et al. 2019, BERT,
section 3.1)."""


class Batch(NamedTuple):
    """One micro batch (a named tuple, so that it is pinned, moved and sent between processes as it is).

    tokens: (batch, length) int64.
    labels: (batch, length) int64, the token each position must predict: the one that comes next, or the one that
        was masked; -100 for none.
    samples: (batch,) int64 window ids, -1 for filler.
    targets: number of labels that are not -100 in the whole global batch of this step, over all ranks and micro
        batches; a sum of losses divided by it is the mean per base.
    """

    tokens: Tensor
    labels: Tensor
    samples: Tensor
    targets: float


def causal_batch(
    sequences: NDArray[np.uint8], samples: NDArray[np.int64], alphabet: Alphabet, targets: int
) -> Batch:
    """Windows (batch, length) uint8 and their ids (batch,) -> their batch for predicting the next base.

    tokens = [bos, b0 .. b(L-2)], labels = [b0 .. b(L-1)]; a base that is no letter is no label. A filler sample
    (-1) is bos, padding and no labels, whatever its bytes. `targets`: see `Batch`.
    """
    labels = alphabet.encode(sequences)
    labels[samples == FILLER] = PAD
    tokens = np.empty_like(labels)
    tokens[:, 0] = BOS
    tokens[:, 1:] = labels[:, :-1]
    labels[labels < FIRST_LETTER] = IGNORE
    return Batch(
        torch.from_numpy(tokens), torch.from_numpy(labels), torch.from_numpy(samples), float(targets)
    )


def masked_batch(
    sequences: NDArray[np.uint8],
    samples: NDArray[np.int64],
    alphabet: Alphabet,
    targets: int,
    *,
    keys: NDArray[np.uint64],
    rate: float,
) -> Batch:
    """Windows (batch, length) uint8 and their ids (batch,) -> their batch for predicting masked bases.

    tokens are the bases; of the letters of a window, `masked_count` are labels: most of them show as `MASK`, some as
    a random letter, some as they are (HIDDEN, REPLACED). Which and how is a function of the window's key. What is
    no letter is never chosen. A filler sample (-1) is padding and no labels. `targets`: see `Batch`.

    keys: (batch,), see `hashing.visit_keys`. rate: share of the letters to predict, in (0, 1].
    """
    tokens = alphabet.encode(sequences)
    tokens[samples == FILLER] = PAD
    labels = np.full_like(tokens, IGNORE)
    for shown, label, key in zip(tokens, labels, keys, strict=True):
        letters = np.flatnonzero(shown >= FIRST_LETTER)
        count = int(masked_count(letters.size, rate))
        if not count:
            continue
        drawn = counted(key, letters)
        least = np.argpartition(drawn, count - 1)[:count]
        chosen, drawn = letters[least], mix(drawn[least])
        label[chosen] = shown[chosen]
        fate = (drawn >> np.uint64(11)) * 2.0**-53  # uniform in [0, 1)
        replaced = fate < HIDDEN + REPLACED
        drawn = mix(drawn[replaced])
        shown[chosen[replaced]] = FIRST_LETTER + (drawn % np.uint64(len(alphabet.letters))).astype(np.int64)
        shown[chosen[fate < HIDDEN]] = MASK
    return Batch(
        torch.from_numpy(tokens), torch.from_numpy(labels), torch.from_numpy(samples), float(targets)
    )


def masked_count(letters: int | NDArray[np.int64], rate: float) -> NDArray[np.int64]:
    """How many letters `masked_batch` chooses in windows of so many: rate · letters, rounded, and at least one."""
    return np.minimum(letters, np.maximum(np.rint(np.multiply(letters, rate)), 1)).astype(np.int64)
