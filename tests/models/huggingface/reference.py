"""Models of transformers that the tests convert, and how two models are compared."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megabase.models import (
    FeedForwardConfig,
    LocalConfig,
    LSHConfig,
    Reformer,
    ReformerClassifier,
    ReformerConfig,
)
from megabase.models.huggingface import from_huggingface
from megabase.models.streams import FloatingPoint

transformers = pytest.importorskip("transformers")

CAUSAL = transformers.ReformerModelWithLMHead
MASKED = transformers.ReformerForMaskedLM
CLASSIFIER = transformers.ReformerForSequenceClassification

SETTINGS: dict[str, Any] = {
    "vocab_size": 13,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "attention_head_size": 6,
    "feed_forward_size": 20,
    "axial_pos_shape": [8, 12],
    "axial_pos_embds_dim": [6, 10],
    "max_position_embeddings": 96,
    "local_attn_chunk_length": 8,
    "lsh_attn_chunk_length": 8,
    "num_hashes": 3,
    "num_buckets": 6,
    "layer_norm_eps": 1e-3,
    "hidden_dropout_prob": 0.0,
    "local_attention_probs_dropout_prob": 0.0,
    "lsh_attention_probs_dropout_prob": 0.0,
}
"""Settings of transformers: small, and unlike the defaults where equal ones could hide a mistake. Chunks are
shorter than the sequences."""

LOCAL = ["local", "local", "local"]
LSH = ["lsh", "lsh"]
MIXED = ["local", "lsh", "local", "lsh"]

CONFIG = ReformerConfig(
    vocab_size=9,
    dim=16,
    depth=3,
    heads=2,
    layers=["local", "lsh"],
    max_length=64,
    positions="axial",
    conv=0,
    residual="float",
    loss_chunk=100,
    lsh=LSHConfig(rounds=2, chunk_length=8, attend="chunk"),
    local=LocalConfig(window=8, attend="chunk"),
    feedforward=FeedForwardConfig(mult=2.7, activation="relu", chunk=32),
)


def transformers_model(
    kind: type, layers: list[str], *, dtype: torch.dtype = torch.float64, **changes: Any
) -> nn.Module:
    """A model of transformers. Every weight but `lm_head.bias` differs from its initial value. In fp64 for the reason
    that test_fp32_errors_come_from_transformers gives."""
    torch.manual_seed(0)
    settings = SETTINGS | {"attn_layers": layers, "is_decoder": kind is CAUSAL} | changes
    model = kind(transformers.ReformerConfig(**settings)).to(dtype).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name != "lm_head.bias":
                weight.add_(0.2 * torch.randn_like(weight))
    return model


class Doubles(FloatingPoint):
    """Streams as fp64, so that neither fixed point nor fp32 hides a difference between the two models."""

    @staticmethod
    def encode(x: Tensor, invalid: Tensor | None = None) -> Tensor:
        return x.to(torch.float64, copy=True)


def converted_to_fp64(model: nn.Module) -> Reformer | ReformerClassifier:
    """from_huggingface, with fp64 streams."""
    converted = from_huggingface(model)
    converted.body.stack.arithmetic = Doubles
    return converted


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


def tokens(batch: int = 2, length: int = 96, vocab: int = 13) -> Tensor:
    return torch.randint(1, vocab, (batch, length), generator=torch.Generator().manual_seed(1))


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    one, two = a.state_dict(), b.state_dict()
    return one.keys() == two.keys() and all(
        one[name].dtype == two[name].dtype and torch.equal(one[name], two[name]) for name in one
    )
