"""Parameters by part, counted from shapes."""

import pytest

from megabase.models import Reformer, ReformerConfig
from megabase.pipeline.plan.parameters import count_parameters


@pytest.mark.parametrize("more", [{}, {"tie_embeddings": True}, {"positions": "axial", "conv": 0}])
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
