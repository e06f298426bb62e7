"""Which windows every rank reads, against the order they must follow."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megabase.datamodules.batches.collate import Batch
from megabase.datamodules.index.shard_index import ShardIndex
from megabase.datamodules.order.permutation import Permutation
from megabase.datamodules.order.windows import PACKED
from megabase.datamodules.prepare.run import prepare
from tests.datamodules.conftest import random_bases
from tests.datamodules.loading import (
    EVERYTHING,
    GLOBAL_BATCH,
    SEED,
    ids_of_step,
    interleaved,
    labelled,
    module,
    same,
    stacked,
    take,
)
from tests.quick import every


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
        expected = ids_of_step(step, len(plan))
        assert torch.cat([batch.samples for batch in dealt]).tolist() == expected.tolist()
        scored = sum(int(labelled(batch).sum()) for batch in dealt)
        assert {batch.targets for batch in dealt} == {float(scored)}


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
        scored = sum(int(labelled(batch).sum()) for batch in dealt)
        assert {batch.targets for batch in dealt} == {float(scored)}
    # A resume is a number here too.
    resumed = take(module(gappy_shards, step=steps - 1, **settings), 1)
    assert all(
        torch.equal(a, b[-GLOBAL_BATCH:]) for a, b in zip(stacked(resumed), stacked(ours), strict=True)
    )


def test_every_epoch_masks_other_bases(lambda_shards: ShardIndex) -> None:
    data = module(lambda_shards, objective="masked", global_batch=66, micro_batch=66)
    first, second = take(data, 2)
    place = [second.samples.tolist().index(sample) for sample in first.samples.tolist()]
    hidden, again = labelled(first), labelled(second)[place]
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
        scored = sum(int(labelled(batch).sum()) for batch in together)
        assert {batch.targets for batch in together} == {float(scored)}


def test_batches_hold_the_windows_they_name(gappy_shards: ShardIndex) -> None:
    data = module(gappy_shards, length=64, micro_batch=4)
    plan = data.windows("train").plan
    for batch in take(data, 3):
        wide = batch.widened()
        for sample, tokens, labels in zip(batch.samples, wide.tokens, wide.labels, strict=True):
            (row,), (start,) = plan.locate(sample[None].numpy())
            expected = gappy_shards.alphabet.encode(gappy_shards.read(row, start, 64)).astype(np.int64)
            assert labels.tolist() == np.where(expected >= 5, expected, -100).tolist()
            assert tokens.tolist() == [1, *expected[:-1]]


def test_resume_needs_only_the_step(lambda_shards: ShardIndex) -> None:
    settings = {"rank": 1, "ranks": 2, "micro_batch": 2}
    through = take(module(lambda_shards, **settings), 12)
    resumed = take(module(lambda_shards, step=9, **settings), 3)
    assert len(resumed) == 6
    assert all(same(one, two) for one, two in zip(through[18:], resumed, strict=True))
    # Another number of ranks goes on with the same steps.
    wider = [take(module(lambda_shards, rank, 4, step=9, micro_batch=2), 1)[0] for rank in range(4)]
    assert torch.cat([batch.samples for batch in wider]).tolist() == ids_of_step(9, 66).tolist()


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("split", ["valid", "test"])
def test_evaluation_reads_every_window_once(lambda_shards: ShardIndex, ranks: int, split: str) -> None:
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
    assert not any(labelled(batch)[batch.samples == -1].any() for batch in in_order)
    for together in zip(*dealt, strict=True):
        scored = sum(int(labelled(batch).sum()) for batch in together)
        assert {batch.targets for batch in together} == {float(scored)}


@pytest.mark.parametrize("ranks", [1, 2])
def test_part_of_the_validation_is_spread_evenly(lambda_shards: ShardIndex, ranks: int) -> None:
    loaders = [module(lambda_shards, rank, ranks).some_validation(3) for rank in range(ranks)]
    n = len(module(lambda_shards).windows("valid").plan)
    assert n > 4
    together = [batch for batches in zip(*map(list, loaders), strict=True) for batch in batches]
    samples = [sample for batch in together for sample in batch.samples.tolist() if sample >= 0]
    assert samples == [0, n // 3, 2 * n // 3]


@pytest.mark.parametrize("objective", ["causal", "masked"])
@pytest.mark.parametrize(
    ("ranks", "micro_batch", "workers"), every(4, [(2, 2, 0), (1, 4, 1), (2, 4, 3), (4, 1, 1)])
)
def test_all_settings_together_give_the_same_global_batches_on_any_ranks(
    genomes: ShardIndex, objective: str, ranks: int, micro_batch: int, workers: int
) -> None:
    steps = 20  # past the first epochs: about 90 windows of the one genome, 25 of the other
    settings = EVERYTHING | {"objective": objective}
    expected = take(module(genomes, **settings), steps)
    dealt = interleaved(
        [
            take(module(genomes, rank, ranks, micro_batch=micro_batch, workers=workers, **settings), steps)
            for rank in range(ranks)
        ]
    )
    assert len(stacked(expected)) == 4
    assert all(torch.equal(a, b) for a, b in zip(stacked(dealt), stacked(expected), strict=True))
    turns = GLOBAL_BATCH // micro_batch
    for step in range(steps):
        batches = dealt[step * turns : (step + 1) * turns]
        assert {batch.targets for batch in batches} == {float(sum(int(labelled(b).sum()) for b in batches))}
    plan = module(genomes, **settings).training_windows().plan
    rows, _ = plan.locate(stacked(expected)[3].numpy())
    assert (rows == PACKED).any() and len(set(genomes.segments.source[rows[rows != PACKED]])) == 2
    resumed = take(module(genomes, step=steps - 3, **settings), 3)
    assert all(map(same, resumed, expected[-3 * GLOBAL_BATCH :]))


@pytest.mark.parametrize("length", [256, 4_194_304])
def test_the_same_shards_serve_any_length(long_shards: ShardIndex, length: int) -> None:
    data = module(long_shards, length=length, global_batch=1)
    (batch,) = take(data, 1)
    _, (start,) = data.training_windows().plan.locate(batch.samples.numpy())
    assert batch.tokens.shape == (1, length)
    expected = long_shards.alphabet.encode(long_shards.read(0, start, length))
    assert np.array_equal(batch.labels[0].numpy(), expected)
    assert batch.targets == labelled(batch).sum()


@pytest.fixture(scope="module")
def long_shards(
    write_fasta: Callable[[Path, dict[str, bytes]], Path], tmp_path_factory: pytest.TempPathFactory
) -> ShardIndex:
    folder = tmp_path_factory.mktemp("long")
    fasta = write_fasta(folder / "long.fa", {"long": random_bases(2 * 4_194_304 + 100)})
    return prepare([fasta], folder / "shards", progress=False)


@pytest.mark.parametrize("more", [{}, EVERYTHING])
def test_step_ten_million_costs_as_much_as_step_zero(
    genomes: ShardIndex, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    compute = Permutation.__call__

    def counting(self: Permutation, positions: np.ndarray) -> np.ndarray:
        asked.append(np.size(positions))
        return compute(self, positions)

    monkeypatch.setattr(Permutation, "__call__", counting)
    work = []
    for step in (0, 10_000_000):
        asked.clear()
        take(module(genomes, step=step, **{"length": 100, **more}), 1)
        work.append(sum(asked))
    assert 0 < work[0] == work[1] < 10_000
