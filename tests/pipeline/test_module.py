"""The LightningModule's parts that need no trainer: the learning rate, weight decay, what ZeRO cannot train."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models import Reformer, ReformerConfig
from pipeline import config
from pipeline.config import OptimConfig
from pipeline.errors import UserError
from pipeline.module import PretrainModule, learning_rate, refuse_shared_blocks

TINY = ReformerConfig(vocab_size=9, dim=8, depth=3, heads=2, layers=["local"])


@given(warmup=st.integers(0, 50), max_steps=st.integers(1, 500), floor=st.floats(0, 1))
def test_the_rate_rises_then_falls_to_its_floor(warmup: int, max_steps: int, floor: float) -> None:
    optim = OptimConfig(lr=0.5, min_lr=floor, warmup_steps=warmup)
    rates = [learning_rate(step, optim, max_steps) for step in range(max_steps + 1)]
    rising, falling = rates[:warmup], rates[warmup:]
    assert rising == sorted(rising) and all(0 < rate <= 0.5 for rate in rising)
    assert falling == sorted(falling, reverse=True)
    if max_steps > warmup:
        assert rates[warmup] == pytest.approx(0.5)
        assert rates[-1] == pytest.approx(0.5 * floor)


def test_only_matrices_decay() -> None:
    run = config.load(
        [], ["run.name=x", "data.shards=s", "model.dim=8", "model.heads=2", "optim.weight_decay=0.3"]
    )
    run.model.vocab_size = 9
    module = PretrainModule(run)
    module.configure_model()
    matrices, vectors = module.configure_optimizers().param_groups
    assert matrices["weight_decay"] == 0.3 and all(p.ndim >= 2 for p in matrices["params"])
    assert vectors["weight_decay"] == 0.0 and all(p.ndim < 2 for p in vectors["params"])
    assert len(matrices["params"]) + len(vectors["params"]) == len(list(module.parameters()))


def test_the_seed_decides_the_weights() -> None:
    run = config.load([], ["run.name=x", "data.shards=s", "model.dim=8", "model.heads=2"])
    run.model.vocab_size = 9
    weights = []
    for _ in range(2):
        torch.rand(3)
        module = PretrainModule(run)
        module.configure_model()
        weights.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    assert torch.equal(*weights)


def test_a_block_shared_between_depths_is_refused_where_zero_cannot_train_it() -> None:
    model = Reformer(TINY)
    for stage in range(4):
        refuse_shared_blocks(model, stage)
    model.body.stack.blocks[2] = model.body.stack.blocks[0]
    refuse_shared_blocks(model, 1)
    for stage in (2, 3):
        with pytest.raises(UserError, match=f"blocks 0 and 2 share the parameter .* zero.stage={stage}"):
            refuse_shared_blocks(model, stage)
