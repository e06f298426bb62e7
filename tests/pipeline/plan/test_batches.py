"""Steps, windows, epochs and tokens of a run."""

from pathlib import Path

import pytest

from megabase.datamodules.batches.visits import training_windows
from megabase.datamodules.index.shard_index import ShardIndex
from megabase.datamodules.prepare.run import prepare
from megabase.pipeline.config.load import load
from megabase.pipeline.plan.batches import Batches, batches_of


def batches(shards: Path, *settings: str, ranks: int = 2) -> Batches:
    config = load([], ["run.name=x", f"data.shards={shards}", "data.length=512", *settings])
    return batches_of(config, ranks, training_windows(config.data, ShardIndex.open(shards)).plan)


def test_a_run_of_two_ranks(lambda_shards: Path) -> None:
    found = batches(lambda_shards, "data.global_batch=8", "data.micro_batch=2", "trainer.max_steps=170")
    # 43,652 bases for training: 85 windows of 512.
    assert (found.ranks, found.micro_batch, found.accumulation, found.windows) == (2, 2, 2, 85)
    assert found.epochs == (16.0, 16.0)
    assert (found.tokens_per_step, found.tokens) == (8 * 512, 8 * 512 * 170)
    assert found.warning is None


def test_a_step_beyond_an_epoch_is_warned_of(lambda_shards: Path) -> None:
    warning = batches(lambda_shards, "data.global_batch=170", "data.micro_batch=1").warning
    assert warning and "data.global_batch=170 is more than the 85 training windows" in warning
    assert "2.0 times" in warning
    assert batches(lambda_shards, "data.global_batch=84", "data.micro_batch=1").warning is None


def test_each_genome_of_a_mixture_has_its_own_epochs(tmp_path: Path) -> None:
    for name, windows in (("a", 10), ("b", 40)):
        (tmp_path / f"{name}.fa").write_text(f">{name}\n{'ACGT' * 128 * windows}\n")
    prepare([tmp_path / "a.fa", tmp_path / "b.fa"], tmp_path / "shards", progress=False)
    mixture = "data.mixture={a: 1, b: 1}"
    found = batches(tmp_path / "shards", mixture, "trainer.max_steps=10", "data.global_batch=8")
    assert found.windows == 50
    assert found.epochs == pytest.approx((1.0, 4.0))
