"""Parameters by part, counted from shapes."""

import pytest

from megabase.models import FeedForwardConfig, LinformerConfig, Reformer, ReformerConfig
from megabase.pipeline.plan.parameters import count_parameters, small_parameters


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"tie_embeddings": True},
        {"positions": "axial", "conv": 0},
        {"positions": "learned", "norm": "rms", "head_bias": False, "head_dim": 6},
        {"feedforward": FeedForwardConfig(mult=2, activation="swiglu"), "values_ahead": False},
    ],
)
def test_the_parts_are_all_parameters_of_the_model(more: dict[str, object]) -> None:
    config = ReformerConfig(
        vocab_size=9, dim=16, depth=3, heads=2, layers=["local", "lsh"], max_length=64, **more
    )
    model = Reformer(config)
    counts = count_parameters(config)
    assert sum(counts.values()) == sum(parameter.numel() for parameter in model.parameters())
    assert list(counts) == [
        *("embedding", "local attention (2 layers)", "lsh attention (1 layer)", "feed-forward", "output"),
    ]
    of_lsh = sum(parameter.numel() for parameter in model.body.stack.blocks[1].f.parameters())
    assert counts["lsh attention (1 layer)"] == of_lsh
    assert counts["embedding"] == sum(each.numel() for each in model.body.embedding.parameters())


@pytest.mark.parametrize("share", ["none", "heads", "keyvalue"])
def test_the_parameters_of_other_layers(share: str) -> None:
    config = ReformerConfig(
        vocab_size=9,
        dim=16,
        depth=3,
        heads=2,
        layers=["linformer", "full", "performer"],
        causal=False,
        max_length=64,
        linformer=LinformerConfig(size=8, share=share),
    )
    sizes = [parameter.numel() for parameter in Reformer(config).parameters()]
    assert sum(count_parameters(config).values()) == sum(sizes)
    assert small_parameters(config, 100) == sum(size for size in sizes if size <= 100)
