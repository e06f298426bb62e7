import numpy as np
import torch

from datamodules.alphabet import Alphabet
from datamodules.collate import causal_batch


def windows(*texts: bytes) -> np.ndarray:
    return np.stack([np.frombuffer(text, np.uint8) for text in texts])


def test_labels_are_the_bases_and_tokens_the_ones_before() -> None:
    batch = causal_batch(windows(b"ACgN", b"TTRA"), np.array([7, 3]), Alphabet.named("dna"), 99)
    assert batch.tokens.tolist() == [[1, 5, 6, 7], [1, 8, 8, 4]]
    assert batch.labels.tolist() == [[5, 6, 7, -100], [8, 8, -100, 5]]
    assert batch.samples.tolist() == [7, 3]
    assert batch.targets == 99.0
    assert {batch.tokens.dtype, batch.labels.dtype, batch.samples.dtype} == {torch.int64}


def test_filler_has_no_label() -> None:
    batch = causal_batch(windows(b"ACGT", b"ACGT"), np.array([-1, 0]), Alphabet.named("dna"), 4)
    assert batch.tokens.tolist() == [[1, 0, 0, 0], [1, 5, 6, 7]]
    assert batch.labels.tolist() == [[-100] * 4, [5, 6, 7, 8]]


def test_every_byte_of_a_text_is_a_label() -> None:
    batch = causal_batch(windows(bytes(range(256))), np.array([0]), Alphabet.named("bytes"), 256)
    assert batch.labels[0].tolist() == list(range(5, 261))
