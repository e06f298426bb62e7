"""The LightningModule: learning rate, weight decay, what ZeRO cannot train; and what it logs under a stock Trainer."""

import csv
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from hypothesis import given
from hypothesis import strategies as st
from pytorch_lightning.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger

from megabase.datamodules.alphabet import Alphabet
from megabase.datamodules.batches.collate import Raw, causal_batch
from megabase.datamodules.datamodule import SequenceDataModule
from megabase.models import Reformer, ReformerConfig, Seeds
from megabase.pipeline.config.load import load
from megabase.pipeline.config.schema import OptimConfig, RunConfig
from megabase.pipeline.errors import UserError
from megabase.pipeline.inference.scoring import evaluate, scored, scorer
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
    module = PretrainModule(run, log=False)
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
        module = PretrainModule(run, log=False)
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
        module = PretrainModule(tiny_run(tmp_path, f"data.softmask_weight={weight}"), log=False)
        module.configure_model()
        module._trainer = SimpleNamespace(accumulate_grad_batches=1, global_step=0, world_size=1)
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


class Losses(pl.Callback):
    """Collects what a stock callback sees after each step and validation."""

    def __init__(self) -> None:
        self.steps: dict[int, float] = {}
        self.valid: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        if trainer.global_step > len(self.steps):
            self.steps[trainer.global_step] = trainer.callback_metrics["train/loss"].item()

    def on_validation_end(self, trainer: pl.Trainer, *_: object) -> None:
        self.valid.append({name: value.item() for name, value in trainer.callback_metrics.items()})


def stock(lambda_shards: Path, root: Path, *more: str) -> tuple[RunConfig, SequenceDataModule]:
    """A run of four steps of two micro batches, and its data."""
    sizes = ["data.length=256", "data.global_batch=4", "data.micro_batch=2", "trainer.max_steps=4"]
    run = tiny_run(root, f"data.shards={lambda_shards}", *sizes, "model.local.window=32", *more)
    return run, SequenceDataModule(run.data, run.run.seed)


def stock_trainer(root: Path, *callbacks: pl.Callback, **more: Any) -> pl.Trainer:
    return pl.Trainer(
        max_steps=4,
        val_check_interval=4,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        callbacks=list(callbacks),
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"accumulate_grad_batches": 2, "logger": False, "default_root_dir": root} | more,
    )


@pytest.mark.parametrize("more", [(), ("data.softmask_weight=0.5",)])
def test_a_stock_trainer_logs_the_exact_losses(
    lambda_shards: Path, tmp_path: Path, more: tuple[str, ...]
) -> None:
    run, data = stock(lambda_shards, tmp_path, *more)
    seen, module = Losses(), PretrainModule(run)
    module.configure_model()
    assert module.model is not None
    expected = []
    for number, batch in zip(range(2), data.train_dataloader(), strict=False):  # the first step, by hand
        wide = batch.widened()
        seeds = Seeds(run=run.run.seed, step=0, samples=batch.samples)
        nats = module.model.loss(wide.tokens, wide.labels, weights=wide.weights, seeds=seeds)
        weight = float(scored(wide, 0)[0])
        expected.append((nats.item(), weight, number))
    stock_trainer(tmp_path, seen, enable_checkpointing=False).fit(module, datamodule=data)
    assert list(seen.steps) == [1, 2, 3, 4]
    assert seen.steps[1] == pytest.approx(sum(n for n, _, _ in expected) / sum(w for _, w, _ in expected))
    # Validation: the same as `megabase train` computes, over batches of unequal numbers of bases.
    exact = evaluate(scorer(module.eval().model, run.run.seed), data.val_dataloader(), torch.device("cpu"))
    assert exact is not None and len(seen.valid) == 2
    assert seen.valid[-1]["valid/loss"] == pytest.approx(exact["valid_loss"], rel=1e-6)
    assert seen.valid[-1]["valid/bits_per_base"] == pytest.approx(exact["valid_bits_per_base"], rel=1e-6)
    assert len(module.micro_nats) <= 2 and len(module.step_samples) <= 8  # the step's, not the run's


def test_stock_callbacks_and_loggers_work(lambda_shards: Path, tmp_path: Path) -> None:
    run, data = stock(lambda_shards, tmp_path, "optim.warmup_steps=2", "optim.lr=0.01")
    best = ModelCheckpoint(tmp_path / "best", monitor="valid/loss")
    stopping = EarlyStopping("valid/bits_per_base", patience=1, min_delta=10.0)  # no model gains 10 bits
    trainer = stock_trainer(
        tmp_path,
        best,
        stopping,
        LearningRateMonitor("step"),
        logger=CSVLogger(tmp_path, "logs"),
        log_every_n_steps=1,
    )
    trainer.fit(PretrainModule(run), datamodule=data)
    assert stopping.stopped_epoch == 0 and trainer.should_stop and Path(best.best_model_path).exists()
    assert best.best_model_score is not None and 1.0 < best.best_model_score.item() < 2.0
    rows = [*csv.DictReader((tmp_path / "logs" / "version_0" / "metrics.csv").open())]
    assert sum(bool(row["train/loss"]) for row in rows) == 4
    rates = {int(row["step"]): float(row["lr-AdamW/pg1"]) for row in rows if row["lr-AdamW/pg1"]}
    assert rates == {step: pytest.approx(learning_rate(step, run.optim, 4)) for step in range(4)}
    [validated] = trainer.validate(PretrainModule(run), datamodule=data, verbose=False)
    assert set(validated) == {"valid/loss", "valid/bits_per_base"}


def test_a_trainer_that_would_make_other_steps_is_refused(lambda_shards: Path, tmp_path: Path) -> None:
    run, data = stock(lambda_shards, tmp_path)
    trainer = stock_trainer(tmp_path, accumulate_grad_batches=1, enable_checkpointing=False)
    with pytest.raises(
        UserError, match=r"accumulate_grad_batches=1: .* need Trainer\(accumulate_grad_batches=2\)"
    ):
        trainer.fit(PretrainModule(run), datamodule=data)
