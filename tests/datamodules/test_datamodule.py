"""What every rank sees: the loaders against the order they must follow, inside and outside a trainer."""

import logging
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf
from torch.utils.data._utils import signal_handling

from datamodules.collate import Batch
from datamodules.config import DataConfig, accumulation
from datamodules.datamodule import SequenceDataModule
from datamodules.errors import DataError
from datamodules.index import ShardIndex
from datamodules.prepare import prepare
from datamodules.windows import samples_of_step

LENGTH, GLOBAL_BATCH, SEED = 512, 8, 11


def module(
    index: ShardIndex, rank: int = 0, ranks: int = 1, step: int = 0, **settings: Any
) -> SequenceDataModule:
    """A data module on one of several ranks, set up for training."""
    config = DataConfig(str(index.directory), **{"length": LENGTH, "global_batch": GLOBAL_BATCH, **settings})
    data = SequenceDataModule(config, SEED)
    data.trainer = SimpleNamespace(global_rank=rank, world_size=ranks, global_step=step)  # type: ignore[assignment]
    data.setup("fit")
    return data


def take(data: SequenceDataModule, steps: int) -> list[Batch]:
    batches = iter(data.train_dataloader())
    return [next(batches) for _ in range(steps * data.accumulation)]


def same(one: Batch, two: Batch) -> bool:
    tensors = zip(one[:3], two[:3], strict=True)
    return all(torch.equal(a, b) for a, b in tensors) and one.targets == two.targets


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("micro_batch", [1, 2])
def test_any_ranks_see_the_same_global_batches(
    lambda_shards: ShardIndex, ranks: int, micro_batch: int
) -> None:
    steps = 10  # past the end of an epoch of 66 windows
    modules = [module(lambda_shards, rank, ranks, micro_batch=micro_batch) for rank in range(ranks)]
    by_rank = [take(data, steps) for data in modules]
    turns = GLOBAL_BATCH // (ranks * micro_batch)
    plan = module(lambda_shards).windows("train").plan
    for step in range(steps):
        dealt = [by_rank[rank][step * turns + turn] for turn in range(turns) for rank in range(ranks)]
        expected = samples_of_step(SEED, step, GLOBAL_BATCH, len(plan))
        assert torch.cat([batch.samples for batch in dealt]).tolist() == expected.tolist()
        scored = sum(int((batch.labels != -100).sum()) for batch in dealt)
        assert {batch.targets for batch in dealt} == {float(scored)}


def interleaved(by_rank: list[list[Batch]]) -> list[Batch]:
    """The micro batches of all ranks, those of a turn beside each other."""
    return [batch for together in zip(*by_rank, strict=True) for batch in together]


def stacked(batches: list[Batch]) -> tuple[torch.Tensor, ...]:
    """tokens, labels and samples, row by row."""
    return tuple(torch.cat(tensors) for tensors in list(zip(*batches, strict=True))[:3])


@pytest.mark.parametrize(("ranks", "micro_batch"), [(1, 4), (2, 2), (4, 1)])
def test_any_ranks_mask_the_same_bases(gappy_shards: ShardIndex, ranks: int, micro_batch: int) -> None:
    settings: dict[str, Any] = {"length": 50, "objective": "masked", "mask_rate": 0.2}
    one = module(gappy_shards, **settings)
    steps = 2 * len(one.windows("train").plan) // GLOBAL_BATCH  # two epochs
    many = [module(gappy_shards, rank, ranks, micro_batch=micro_batch, **settings) for rank in range(ranks)]
    ours = interleaved([take(data, steps) for data in many])
    assert all(torch.equal(a, b) for a, b in zip(stacked(ours), stacked(take(one, steps)), strict=True))
    turns = GLOBAL_BATCH // micro_batch
    for step in range(steps):
        dealt = ours[step * turns : (step + 1) * turns]
        scored = sum(int((batch.labels != -100).sum()) for batch in dealt)
        assert {batch.targets for batch in dealt} == {float(scored)}
    # A resume is a number here too.
    resumed = take(module(gappy_shards, step=steps - 1, **settings), 1)
    assert all(
        torch.equal(a, b[-GLOBAL_BATCH:]) for a, b in zip(stacked(resumed), stacked(ours), strict=True)
    )


def test_other_bases_are_masked_in_every_epoch(lambda_shards: ShardIndex) -> None:
    data = module(lambda_shards, objective="masked", global_batch=66, micro_batch=66)
    first, second = take(data, 2)
    place = [second.samples.tolist().index(sample) for sample in first.samples.tolist()]
    hidden, again = first.labels != -100, second.labels[place] != -100
    assert (hidden.sum(1) == 77).all() and (again.sum(1) == 77).all()
    # As many in common as by chance.
    assert (hidden & again).double().sum(1).mean().item() == pytest.approx(77 * 77 / 512, rel=0.1)


@pytest.mark.parametrize("ranks", [1, 2])
def test_evaluation_masks_the_same_bases_whatever_the_seed(gappy_shards: ShardIndex, ranks: int) -> None:
    settings: dict[str, Any] = {"length": 50, "objective": "masked"}
    dealt = []
    for rank in range(ranks):
        data = module(gappy_shards, rank, ranks, micro_batch=2, **settings)
        data.seed = SEED + ranks
        dealt.append(list(data.some_validation(0)))
    expected = list(module(gappy_shards, **settings).some_validation(0))
    for a, b in zip(stacked(interleaved(dealt)), stacked(expected), strict=True):
        assert torch.equal(a[: len(b)], b)
    for together in zip(*dealt, strict=True):
        scored = sum(int((batch.labels != -100).sum()) for batch in together)
        assert {batch.targets for batch in together} == {float(scored)}


@pytest.mark.parametrize("loader", ["train_dataloader", "val_dataloader"])
@pytest.mark.parametrize("objective", ["causal", "masked"])
def test_workers_change_nothing(gappy_shards: ShardIndex, loader: str, objective: str) -> None:
    settings: dict[str, Any] = {"length": 64, "micro_batch": 2, "rank": 1, "ranks": 2, "step": 3}
    settings["objective"] = objective
    alone, shared = (module(gappy_shards, workers=workers, **settings) for workers in (0, 2))
    for _, one, two in zip(range(7), getattr(alone, loader)(), getattr(shared, loader)(), strict=False):
        assert same(one, two)


def test_a_stop_signal_finds_no_reader_unprepared(
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


def test_batches_hold_the_windows_they_name(gappy_shards: ShardIndex) -> None:
    data = module(gappy_shards, length=64, micro_batch=4)
    plan = data.windows("train").plan
    for batch in take(data, 3):
        for sample, tokens, labels in zip(batch.samples, batch.tokens, batch.labels, strict=True):
            (row,), (start,) = plan.locate(sample[None].numpy())
            expected = gappy_shards.alphabet.encode(gappy_shards.read(row, start, 64))
            assert labels.tolist() == np.where(expected >= 5, expected, -100).tolist()
            assert tokens.tolist() == [1, *expected[:-1]]


def test_a_resume_is_a_number(lambda_shards: ShardIndex) -> None:
    settings = {"rank": 1, "ranks": 2, "micro_batch": 2}
    through = take(module(lambda_shards, **settings), 12)
    resumed = take(module(lambda_shards, step=9, **settings), 3)
    assert len(resumed) == 6
    assert all(same(one, two) for one, two in zip(through[18:], resumed, strict=True))
    # Another number of ranks goes on with the same steps.
    wider = [take(module(lambda_shards, rank, 4, step=9, micro_batch=2), 1)[0] for rank in range(4)]
    assert torch.cat([batch.samples for batch in wider]).tolist() == samples_of_step(SEED, 9, 8, 66).tolist()


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("split", ["valid", "test"])
def test_evaluation_sees_every_window_once(lambda_shards: ShardIndex, ranks: int, split: str) -> None:
    dealt: list[list[Batch]] = []
    for rank in range(ranks):
        data = module(lambda_shards, rank, ranks, micro_batch=2)
        loader = data.val_dataloader() if split == "valid" else data.test_dataloader()
        assert isinstance(loader, torch.utils.data.DataLoader)
        dealt.append(list(loader))
        assert len(loader) == len(dealt[-1])
    assert len({len(batches) for batches in dealt}) == 1
    in_order = [batch for together in zip(*dealt, strict=True) for batch in together]
    samples = torch.cat([batch.samples for batch in in_order])
    n = len(data.windows(split).plan)
    assert samples.tolist() == list(range(n)) + [-1] * (len(samples) - n)
    assert all((batch.labels[batch.samples == -1] == -100).all() for batch in in_order)
    for together in zip(*dealt, strict=True):
        scored = sum(int((batch.labels != -100).sum()) for batch in together)
        assert {batch.targets for batch in together} == {float(scored)}


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_part_of_the_validation_is_spread_over_all_of_it(lambda_shards: ShardIndex, ranks: int) -> None:
    loaders = [module(lambda_shards, rank, ranks).some_validation(3) for rank in range(ranks)]
    n = len(module(lambda_shards).windows("valid").plan)
    assert n > 4
    together = [batch for batches in zip(*map(list, loaders), strict=True) for batch in batches]
    samples = [sample for batch in together for sample in batch.samples.tolist() if sample >= 0]
    assert samples == [0, n // 3, 2 * n // 3]


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
    expected = np.concatenate([samples_of_step(SEED, step, GLOBAL_BATCH, 66) for step in range(5)])
    assert first.train_samples + second.train_samples == expected.tolist()
    assert first.val_samples == list(range(18))


@LIGHTNING_HINTS
def test_training_goes_on_without_a_validation_window(
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
    assert caplog.text == ""  # none was asked for: nothing to warn of
    with pytest.raises(DataError, match="split 'valid' is not in the shards"):
        without.setup("validate")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"length": 40_000}, "split 'train' has no window of data.length 40000"),
        ({"micro_batch": 3}, "data.global_batch 8 is no multiple of data.micro_batch 3 x 1 ranks"),
        ({"workers": -1}, "data.workers -1"),
        ({"objective": "mask"}, "data.objective 'mask': choose causal or masked"),
        ({"mask_rate": 0.0}, "data.mask_rate 0.0"),
        ({"mask_rate": 1.5}, "data.mask_rate 1.5"),
    ],
)
def test_setup_refuses_what_cannot_work(
    lambda_shards: ShardIndex, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        module(lambda_shards, **settings)


def test_accumulation_makes_the_global_batch_exactly() -> None:
    assert accumulation(512, 4, 16) == 8
    assert accumulation(8, 8, 1) == 1


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            (10, 4, 2),
            "10 is no multiple of data.micro_batch 4 x 2 ranks: set data.micro_batch to one of 1, 5",
        ),
        ((10, 4, 2), "1, 5, or data.global_batch to 8 or 16$"),
        ((8, 1, 3), "x 3 ranks: set data.global_batch to 6 or 9$"),
        ((2, 1, 4), "x 4 ranks: set data.global_batch to 4$"),
        ((5040, 11, 1), r"1, 2, 3, 4, \.\.\., 1260, 1680, 2520, 5040, or data.global_batch to 5038 or 5049$"),
        ((0, 1, 1), "data.global_batch 0: must be at least 1"),
        ((4, 0, 1), "data.micro_batch 0: must be at least 1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_those_that_would(
    sizes: tuple[int, int, int], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        accumulation(*sizes)


def test_the_config_is_a_schema_for_omegaconf() -> None:
    config = OmegaConf.merge(OmegaConf.structured(DataConfig), OmegaConf.from_dotlist(["length=64"]))
    assert config.length == 64
    assert OmegaConf.missing_keys(config) == {"shards"}
