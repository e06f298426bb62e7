"""What every rank sees: the loaders against the order they must follow, inside and outside a trainer."""

import logging
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data._utils import signal_handling

from megabase.datamodules.batches.collate import Batch
from megabase.datamodules.config import DataConfig
from megabase.datamodules.datamodule import SequenceDataModule
from megabase.datamodules.errors import DataError
from megabase.datamodules.index.shard_index import ShardIndex
from megabase.datamodules.prepare.run import prepare
from tests.datamodules.loading import (
    GLOBAL_BATCH,
    LENGTH,
    SEED,
    ids_of_step,
    module,
    same,
    take,
)


@pytest.mark.parametrize("loader", ["train_dataloader", "val_dataloader"])
@pytest.mark.parametrize("objective", ["causal", "masked"])
def test_workers_change_nothing(gappy_shards: ShardIndex, loader: str, objective: str) -> None:
    settings: dict[str, Any] = {"length": 64, "micro_batch": 2, "rank": 1, "ranks": 2, "step": 3}
    settings["objective"] = objective
    alone, shared = (module(gappy_shards, workers=workers, **settings) for workers in (0, 2))
    for _, one, two in zip(range(7), getattr(alone, loader)(), getattr(shared, loader)(), strict=False):
        assert same(one, two)


def test_readers_are_forked_whatever_the_default_start_method_is(
    lambda_shards: ShardIndex,
) -> None:
    """Python 3.14 has another default; readers of a fork server are not children of the rank, and would end."""
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("forkserver", force=True)
    try:
        read = take(module(lambda_shards, workers=2), 2)
    finally:
        multiprocessing.set_start_method(before, force=True)
    assert all(map(same, read, take(module(lambda_shards), 2)))


def test_stop_signal_during_the_start_of_readers_ends_none(
    lambda_shards: ShardIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    install = signal_handling._set_worker_signal_handlers

    def signalled(*arguments: Any) -> None:
        """In a reader, as soon as torch's own handlers are there, which would end it."""
        install(*arguments)
        for signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            os.kill(os.getpid(), signum)

    monkeypatch.setattr(signal_handling, "_set_worker_signal_handlers", signalled)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    alone, shared = (take(module(lambda_shards, workers=workers), 2) for workers in (0, 2))
    assert all(map(same, alone, shared))
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before


def test_short_records_that_are_left_out_are_logged_once(
    genomes: ShardIndex, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        take(module(genomes, length=100), 2)
        take(module(genomes, length=100, rank=1, ranks=2), 2)
        take(module(genomes, length=100, pack=True), 2)
    (told,) = [record.getMessage() for record in caplog.records]
    short = genomes.segments.length[genomes.segments.rows_of("train")]
    assert told.startswith(
        f"{short[short < 100].sum()} bases for training lie in parts of records shorter than"
    )


class Watcher(pl.LightningModule):
    """Remembers the samples of every batch; learns nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.train_samples: list[int] = []
        self.val_samples: list[int] = []

    def training_step(self, batch: Batch, _: int) -> torch.Tensor:
        self.train_samples += batch.samples.tolist()
        return self.weight * batch.targets

    def validation_step(self, batch: Batch, _: int) -> None:
        self.val_samples += batch.samples.tolist()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


LIGHTNING_HINTS = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",
    "ignore:The `srun` command",
    "ignore:`isinstance",
    "ignore:Total length",
)


def fit(data: SequenceDataModule, folder: Path, steps: int, checkpoint: Path | None = None) -> Watcher:
    watcher = Watcher()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        accumulate_grad_batches=data.accumulation,
        val_check_interval=3 * data.accumulation,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(watcher, data, ckpt_path=checkpoint, weights_only=False)
    trainer.save_checkpoint(folder / f"{steps}.ckpt")
    return watcher


@LIGHTNING_HINTS
def test_lightning_trains_validates_and_resumes(lambda_shards: ShardIndex, tmp_path: Path) -> None:
    config = DataConfig(str(lambda_shards.directory), LENGTH, GLOBAL_BATCH, micro_batch=2)
    first = fit(SequenceDataModule(config, SEED), tmp_path, 3)
    second = fit(SequenceDataModule(config, SEED), tmp_path, 5, tmp_path / "3.ckpt")
    expected = np.concatenate([ids_of_step(step, 66) for step in range(5)])
    assert first.train_samples + second.train_samples == expected.tolist()
    assert first.val_samples == list(range(18))


@LIGHTNING_HINTS
def test_training_continues_without_a_validation_window(
    lambda_shards: ShardIndex, lambda_fasta: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    too_long = SequenceDataModule(DataConfig(str(lambda_shards.directory), 16_384, 1), SEED)
    with caplog.at_level(logging.WARNING):
        watcher = fit(too_long, tmp_path, 4)
    assert len(watcher.train_samples) == 4
    assert watcher.val_samples == []
    assert not too_long.has_validation
    assert (
        "training goes on without validation: split 'valid' has no window of data.length 16384" in caplog.text
    )
    caplog.clear()
    without = module(prepare([lambda_fasta], tmp_path / "shards", progress=False))
    assert without.val_dataloader() == []
    ours = [record for record in caplog.records if record.name.startswith("megabase")]
    assert not ours  # none was asked for: nothing to warn of
    with pytest.raises(DataError, match="split 'valid' is not in the shards"):
        without.setup("validate")


def test_workers_read_the_configured_number_of_batches_ahead(lambda_shards: ShardIndex) -> None:
    assert module(lambda_shards, workers=1, prefetch=5).train_dataloader().prefetch_factor == 5
    assert module(lambda_shards, prefetch=5).train_dataloader().prefetch_factor is None
