"""Bytes of windows to the tensors of a batch: one table look-up."""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from datamodules.alphabet import BOS, FIRST_LETTER, PAD, Alphabet

IGNORE = -100
FILLER = -1


class Batch(NamedTuple):
    """One micro batch (a named tuple, so that it is pinned, moved and sent between processes as it is).

    tokens: (batch, length) int64.
    labels: (batch, length) int64, the token each position must predict, -100 for none.
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
