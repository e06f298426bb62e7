"""What every rank sees: the loaders against the order they must follow, inside and outside a trainer."""

import logging
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray
from omegaconf import OmegaConf
from torch.utils.data._utils import signal_handling

from megabase.datamodules.batches.collate import Batch
from megabase.datamodules.config import CYCLE, DataConfig, accumulation
from megabase.datamodules.datamodule import SequenceDataModule
from megabase.datamodules.errors import DataError
from megabase.datamodules.index.shard_index import ShardIndex
from megabase.datamodules.order.hashing import mix, visit_keys
from megabase.datamodules.order.mixture import identity_of
from megabase.datamodules.order.permutation import Permutation
from megabase.datamodules.order.training_order import Order
from megabase.datamodules.order.windows import PACKED
from megabase.datamodules.prepare.run import prepare

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


def ids_of_step(step: int, windows: int) -> NDArray[np.int64]:
    """Ids of the windows in a global batch of `take`."""
    return Order(SEED, (0, windows)).of_step(step, GLOBAL_BATCH)[0]


def same(one: Batch, two: Batch) -> bool:
    return all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(one, two, strict=True)
    )


def labelled(batch: Batch) -> torch.Tensor:
    """Where a batch has labels: (batch, length) bool."""
    return batch.widened().labels != -100


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


def interleaved(by_rank: list[list[Batch]]) -> list[Batch]:
    """The micro batches of all ranks, those of a turn beside each other."""
    return [batch for together in zip(*by_rank, strict=True) for batch in together]


def stacked(batches: list[Batch]) -> tuple[torch.Tensor, ...]:
    """tokens, labels, weights if there are any, and samples, row by row."""
    columns = zip(*((*batch.widened(), batch.samples) for batch in batches), strict=True)
    return tuple(torch.cat(tensors) for tensors in columns if tensors[0] is not None)


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


def test_other_bases_are_masked_in_every_epoch(lambda_shards: ShardIndex) -> None:
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
        wide = batch.widened()
        for sample, tokens, labels in zip(batch.samples, wide.tokens, wide.labels, strict=True):
            (row,), (start,) = plan.locate(sample[None].numpy())
            expected = gappy_shards.alphabet.encode(gappy_shards.read(row, start, 64)).astype(np.int64)
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
    assert torch.cat([batch.samples for batch in wider]).tolist() == ids_of_step(9, 66).tolist()


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
    assert not any(labelled(batch)[batch.samples == -1].any() for batch in in_order)
    for together in zip(*dealt, strict=True):
        scored = sum(int(labelled(batch).sum()) for batch in together)
        assert {batch.targets for batch in together} == {float(scored)}


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_part_of_the_validation_is_spread_over_all_of_it(lambda_shards: ShardIndex, ranks: int) -> None:
    loaders = [module(lambda_shards, rank, ranks).some_validation(3) for rank in range(ranks)]
    n = len(module(lambda_shards).windows("valid").plan)
    assert n > 4
    together = [batch for batches in zip(*map(list, loaders), strict=True) for batch in batches]
    samples = [sample for batch in together for sample in batch.samples.tolist() if sample >= 0]
    assert samples == [0, n // 3, 2 * n // 3]


def random_bases(length: int) -> bytes:
    """Both cases, and a run of N over a twentieth."""
    bases = np.random.default_rng(length).choice(np.frombuffer(b"ACGTacgt", np.uint8), length)
    bases[length // 3 : length // 3 + length // 20] = ord("N")
    return bases.tobytes()


@pytest.fixture(scope="module")
def genomes(
    write_fasta: Callable[[Path, dict[str, bytes]], Path], tmp_path_factory: pytest.TempPathFactory
) -> ShardIndex:
    """Two genomes, with scaffolds of 20 to 90 bases beside longer records."""
    folder = tmp_path_factory.mktemp("genomes")
    one = {f"a{n}": random_bases(length) for n, length in enumerate([3000, 50, 20, 700, 90, 33])}
    two = {f"b{n}": random_bases(length) for n, length in enumerate([40, 900, 61, 25])}
    inputs = [write_fasta(folder / "a.fa", one), write_fasta(folder / "b.fa", two)]
    return prepare(inputs, folder / "shards", valid=0.1, progress=False)


EVERYTHING: dict[str, Any] = {
    "length": 100,
    "stride": 37,
    "shift": 30,
    "reverse_complement": 0.5,
    "softmask_weight": 0.25,
    "mixture": {"a.fa": 2.0, "b*": 1.0},
    "pack": True,
    "on_error": "skip",
}


@pytest.mark.parametrize("objective", ["causal", "masked"])
@pytest.mark.parametrize(("ranks", "micro_batch", "workers"), [(1, 4, 1), (2, 2, 0), (2, 4, 3), (4, 1, 1)])
def test_everything_at_once_gives_the_same_global_batches(
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


def written(batch: Batch, index: ShardIndex) -> list[bytes]:
    """The windows of a batch of plain bases, as letters."""
    return [index.alphabet.decode(row) for row in batch.labels.numpy()]


def test_a_visit_moves_its_window_and_stays_inside_the_segment(
    lambda_shards: ShardIndex, lambda_bases: bytes
) -> None:
    data = module(lambda_shards, shift=100, global_batch=66, micro_batch=66)
    plan = data.training_windows().plan
    moves: list[int] = []
    visits: list[dict[int, int]] = []
    for batch in take(data, 3):
        _, starts = plan.locate(batch.samples.numpy())
        found = [lambda_bases.index(text) for text in written(batch, lambda_shards)]
        assert min(found) >= 0 and max(found) <= 33_952 - LENGTH
        moves += (np.array(found) - starts).tolist()
        visits.append(dict(zip(batch.samples.tolist(), found, strict=True)))
        assert labelled(batch).sum() == batch.targets
    assert min(moves) < -80 and max(moves) > 80 and max(map(abs, moves)) <= 100
    assert abs(np.mean(moves)) < 15
    assert visits[0] != visits[1]  # every visit has its own


def test_the_moves_the_strands_and_the_masks_know_nothing_of_each_other(lambda_shards: ShardIndex) -> None:
    windows = module(lambda_shards, shift=50, reverse_complement=0.5).training_windows()
    keys = visit_keys(1, np.arange(66 * 100) // 66, np.tile(np.arange(66), 100))
    visits = windows.visits(np.full(6600, 30), keys)
    moves, turned = visits.starts - 30 * LENGTH, visits.turned
    assert np.bincount(moves + 50).std() < 3 * (6600 / 101) ** 0.5 and len(np.unique(moves)) == 101
    assert abs(turned.mean() - 0.5) < 0.03
    masked = (mix(keys) >> np.uint64(63)).astype(np.int64)  # what decides about a window's first letter
    for one, other in ((moves, turned), (moves, masked), (turned, masked)):
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.05


@pytest.mark.parametrize("objective", ["causal", "masked"])
def test_the_other_strand_is_read_as_often_as_asked(
    lambda_shards: ShardIndex, lambda_bases: bytes, objective: str
) -> None:
    partners = bytes.maketrans(b"ACGT", b"TGCA")
    data = module(
        lambda_shards,
        reverse_complement=0.3,
        global_batch=66,
        micro_batch=66,
        objective=objective,
        mask_rate=1.0,
    )
    forward = turned = 0
    plan = data.training_windows().plan
    for batch in take(data, 5):
        _, starts = plan.locate(batch.samples.numpy())
        for start, text in zip(starts, written(batch, lambda_shards), strict=True):
            expected = lambda_bases[start : start + LENGTH]
            forward += text == expected
            turned += text == expected.translate(partners)[::-1]
    assert forward + turned == 330
    assert abs(turned - 99) < 4 * (330 * 0.3 * 0.7) ** 0.5
    always = module(lambda_shards, reverse_complement=1.0)
    assert (
        always.training_windows()
        .visits(np.zeros(1000, np.int64), np.arange(1000, dtype=np.uint64))
        .turned.all()
    )


def test_packed_windows_are_records_with_separators_each_turned_at_its_place(genomes: ShardIndex) -> None:
    segments = genomes.segments
    for turn in (0.0, 1.0):
        windows = module(genomes, length=100, pack=True, reverse_complement=turn, shift=20).training_windows()
        plan = windows.plan
        assert plan.tape is not None
        ids = np.arange(len(plan))
        rows, starts = plan.locate(ids)
        packed = ids[rows == PACKED]
        assert len(packed) == 3
        visits = windows.visits(packed, np.arange(len(packed), dtype=np.uint64))
        batch = windows.batch(visits, 0)
        assert labelled(batch).sum(1).tolist() == visits.labels.tolist()
        for labels, start in zip(batch.labels.numpy(), starts[rows == PACKED].tolist(), strict=True):
            expected = np.zeros(100, np.uint8)
            expected[plan.tape.separators(start)] = 2
            for piece in plan.tape.pieces(start):
                assert segments.length[piece.row] < 100
                bases = genomes.read(piece.row, piece.start, piece.length)
                bases = genomes.alphabet.reverse_complement(bases) if turn else bases
                expected[piece.at : piece.at + piece.length] = genomes.alphabet.encode(bases)
            assert labels.tolist() == expected.tolist()
            assert (expected == 2).any()


def test_evaluation_knows_no_augmentation_and_no_weights(genomes: ShardIndex) -> None:
    plain = list(module(genomes, length=50, pack=True).some_validation(0))
    settings = EVERYTHING | {"length": 50, "on_error": "raise"}
    assert all(map(same, plain, module(genomes, **settings).some_validation(0)))
    assert {batch.soft for batch in plain} == {None}


def test_a_mixture_is_met_in_its_proportions(genomes: ShardIndex) -> None:
    data = module(
        genomes, length=100, mixture={"a.fa": 1.0, "b.fa": 3.0}, global_batch=CYCLE, micro_batch=CYCLE
    )
    rows, _ = data.training_windows().plan.locate(take(data, 1)[0].samples.numpy())
    assert (genomes.segments.source[rows] == "b.fa").sum() == 3 * CYCLE // 4


def test_short_records_that_are_left_out_are_told_once(
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


@pytest.fixture
def damaged_shards(lambda_fasta: Path, tmp_path: Path) -> ShardIndex:
    """Lambda with one base changed: number 20,000 of the training part."""
    index = prepare([lambda_fasta], tmp_path / "damaged", valid=0.2, progress=False)
    shard = index.directory / index.segments.shard[0]
    content = bytearray(shard.read_bytes())
    content[index.segments.offset[0] + 20_000] ^= 1
    shard.write_bytes(content)
    return ShardIndex.open(index.directory)


@pytest.mark.parametrize("workers", [0, 2])
def test_what_cannot_be_read_is_skipped_and_counted(
    damaged_shards: ShardIndex, lambda_shards: ShardIndex, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(DataError, match="gi"):
        take(module(damaged_shards), 12)
    with caplog.at_level(logging.WARNING):
        batches = take(module(damaged_shards, on_error="skip", workers=workers, micro_batch=4), 18)
    skipped = {
        int(batch.samples[slot]) for batch in batches for slot in range(4) if not labelled(batch)[slot].any()
    }
    assert skipped and 20_000 // LENGTH in skipped
    assert sum(batch.skipped for batch in batches) >= len(skipped)
    for batch in batches:
        assert batch.skipped == sum(sample in skipped for sample in batch.samples.tolist())
        assert (batch.tokens[~labelled(batch).any(1)][:, 1:] == 0).all()
    # The order is that of whole shards: every rank keeps step.
    n = len(module(damaged_shards).windows("train").plan)
    seen = torch.cat([batch.samples for batch in batches]).tolist()
    assert seen == [s for step in range(18) for s in ids_of_step(step, n).tolist()]
    if not workers:
        assert caplog.text.count("data.on_error=skip: a window is left out") == 1


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
def test_step_ten_million_costs_what_step_zero_costs(
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


def test_augmentations_that_an_alphabet_cannot_have_are_refused(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("all work and no play " * 100)
    index = prepare([text], tmp_path / "shards", alphabet="bytes", progress=False)
    assert take(module(index), 1)[0].codes.dtype == torch.int16
    with pytest.raises(
        DataError, match=r"data.reverse_complement 0.5: alphabet bytes has no reverse complement"
    ):
        module(index, reverse_complement=0.5)
    with pytest.raises(DataError, match=r"data.softmask_weight 0.5: lower case is no mask in alphabet bytes"):
        module(index, softmask_weight=0.5)


def test_workers_read_as_many_batches_ahead_as_asked(lambda_shards: ShardIndex) -> None:
    assert module(lambda_shards, workers=1, prefetch=5).train_dataloader().prefetch_factor == 5
    assert module(lambda_shards, prefetch=5).train_dataloader().prefetch_factor is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"length": 40_000}, "split 'train' has no window of data.length 40000"),
        ({"micro_batch": 3}, "data.global_batch 8 is no multiple of data.micro_batch 3 x 1 ranks"),
        ({"workers": -1}, "data.workers -1"),
        ({"objective": "mask"}, "data.objective 'mask': choose causal or masked"),
        ({"mask_rate": 0.0}, "data.mask_rate 0.0"),
        ({"mask_rate": 1.5}, "data.mask_rate 1.5"),
        ({"stride": 0}, "data.stride 0: must be at least 1 base, or null for data.length"),
        ({"shift": -1}, "data.shift -1: must be 0 or more bases"),
        ({"reverse_complement": 1.5}, "data.reverse_complement 1.5: must lie between 0 and 1"),
        ({"reverse_complement": float("nan")}, "data.reverse_complement nan: must lie between 0 and 1"),
        ({"softmask_weight": -0.1}, "data.softmask_weight -0.1: must lie between 0 and 1"),
        ({"mixture": {"a.fa": -1.0}}, "data.mixture 'a.fa': weight -1.0 must be 0 or more"),
        ({"mixture": {"a.fa": float("inf")}}, "data.mixture 'a.fa': weight inf must be 0 or more"),
        ({"mixture": {"a": {"fa": 2.0}}}, "data.mixture 'a': {'fa': 2.0} is no weight"),
        ({"mixture": {"a.fa": 0.0}}, "data.mixture: every weight is 0"),
        ({"mixture": {"other.fa": 1.0}}, "data.mixture: 'other.fa' matches nothing .* 'lambda_phage.fna.gz'"),
        (
            {"mixture": {"a": 1e-4, "b": 1.0}},
            "data.mixture: weight 0.0001 is less than 1/1024 of all weights",
        ),
        ({"on_error": "ignore"}, "data.on_error 'ignore': choose raise or skip"),
        ({"prefetch": 0}, "data.prefetch 0: must be at least 1 batch"),
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


def test_a_mixture_s_identity_knows_its_keys_order_and_files(genomes: ShardIndex) -> None:
    one, two = ({"a.fa": 2.0, "b*": 1.0}, {"b*": 1.0, "a.fa": 2.0})
    identities = {identity_of(genomes.segments, mixture) for mixture in ({}, one, two)}
    moved = replace(genomes.segments, source=genomes.segments.source[::-1])
    assert moved.identity == genomes.segments.identity == identity_of(moved, {})
    assert len(identities | {identity_of(moved, one)}) == 4
