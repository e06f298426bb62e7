"""The LightningModule's parts that need no trainer: the learning rate, weight decay, what ZeRO cannot train."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megabase.datamodules.alphabet import Alphabet
from megabase.datamodules.batches.collate import Raw, causal_batch
from megabase.models import Reformer, ReformerConfig
from megabase.pipeline.config.load import load
from megabase.pipeline.config.schema import OptimConfig, RunConfig
from megabase.pipeline.errors import UserError
from megabase.pipeline.training.module import PretrainModule, learning_rate, refuse_shared_blocks

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
    run = load([], ["run.name=x", "data.shards=s", "model.dim=8", "model.heads=2", "optim.weight_decay=0.3"])
    run.model.vocab_size = 9
    module = PretrainModule(run, data_ranks=1)
    module.configure_model()
    matrices, vectors = module.configure_optimizers().param_groups
    assert matrices["weight_decay"] == 0.3 and all(p.ndim >= 2 for p in matrices["params"])
    assert vectors["weight_decay"] == 0.0 and all(p.ndim < 2 for p in vectors["params"])
    assert len(matrices["params"]) + len(vectors["params"]) == len(list(module.parameters()))


def test_the_seed_decides_the_weights() -> None:
    run = load([], ["run.name=x", "data.shards=s", "model.dim=8", "model.heads=2"])
    run.model.vocab_size = 9
    weights = []
    for _ in range(2):
        torch.rand(3)
        module = PretrainModule(run, data_ranks=1)
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


def tiny_run(root: Path, *more: str) -> RunConfig:
    settings = [f"run.root={root}", "run.name=x", "data.shards=s", "data.length=8"]
    run = load(
        [], [*settings, "model.dim=8", "model.depth=1", "model.heads=2", "model.layers=[local]", *more]
    )
    run.model.vocab_size = 9
    return run


def test_soft_masked_letters_weigh_less_in_training_and_the_same_in_evaluation(tmp_path: Path) -> None:
    bases = np.frombuffer(b"\0ACgtaNGT" + b"\0aCGTACGT", np.uint8).reshape(2, 9)
    raw = Raw(bases, np.arange(2), np.zeros(2, bool))
    nats, scored = {}, {}
    for weight in (1.0, 0.5, 0.0):
        module = PretrainModule(tiny_run(tmp_path, f"data.softmask_weight={weight}"), data_ranks=1)
        module.configure_model()
        module._trainer = SimpleNamespace(accumulate_grad_batches=1, global_step=0)
        batch = causal_batch(raw, Alphabet.named("dna"), 20, weight)
        loss = module.training_step(batch, 0)
        module.training_step(batch, 1)
        assert module.step_nats is not None
        assert loss.item() * 20 == pytest.approx(module.step_nats.item() / 2)  # the divisor stays
        nats[weight], scored[weight] = loss.item() * 20, module.step_scored
        sums = module.validation_step(batch, 0)
        assert sums["nats"].item() == pytest.approx(nats[1.0]) and sums["bases"] == 15
    assert nats[0.5] == pytest.approx((nats[1.0] + nats[0.0]) / 2)
    assert nats[0.0] < nats[1.0]
    assert scored[1.0] is None  # the index gives the number of labels
    assert [scored[w].tolist() for w in (0.5, 0.0)] == [[26, 0], [22, 0]]
