"""Classifiers: by the mean over real tokens, and by the first token."""

import dataclasses

import torch
from torch import Tensor

from megabase.models import LocalConfig, LSHConfig, ReformerClassifier, ReformerConfig, Seeds

SMALL = ReformerConfig(
    vocab_size=9,
    dim=16,
    depth=3,
    heads=2,
    layers=["local", "lsh", "full"],
    max_length=64,
    lsh=LSHConfig(rounds=2, chunk_length=8),
    local=LocalConfig(window=8),
)


def tokens(batch: int = 2, length: int = 50, seed: int = 0) -> Tensor:
    return torch.randint(5, 9, (batch, length), generator=torch.Generator().manual_seed(seed))


def test_classifying_by_the_mean_ignores_padding():
    model = ReformerClassifier(dataclasses.replace(SMALL, causal=False), classes=3).eval()
    x = tokens(length=40)
    mask = torch.arange(40) < torch.tensor([[40], [25]])
    logits = model(x, mask=mask)
    assert logits.shape == (2, 3)
    torch.testing.assert_close(logits[1:], model(x[1:, :25]), atol=1e-4, rtol=1e-4)
    logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_classifying_by_the_first_token_equals_its_formula():
    config = dataclasses.replace(SMALL, causal=False, classifier="first", dropout=0.2)
    model = ReformerClassifier(config, classes=3)
    x = tokens(length=40)
    logits = model(x, seeds=Seeds(1, 2))
    assert torch.equal(model(x, seeds=Seeds(1, 2)), logits)
    logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    # Dropout within the head is a function of the seeds too.
    hidden = torch.randn(2, 32)
    assert not torch.equal(model.head(hidden, Seeds(1, 2)), model.head(hidden, Seeds(1, 3)))
    model.eval()
    hidden = model.body(x)[:, 0]
    expected = model.head.output(model.head.dense(hidden).tanh())
    torch.testing.assert_close(model(x), expected)
