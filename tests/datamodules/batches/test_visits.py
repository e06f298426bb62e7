"""Augmented, packed and unreadable windows, against the records."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from megabase.datamodules.alphabet import FIRST_LETTER
from megabase.datamodules.batches.collate import Batch
from megabase.datamodules.config import CYCLE
from megabase.datamodules.errors import DataError
from megabase.datamodules.index.shard_index import ShardIndex
from megabase.datamodules.order.hashing import mix, visit_keys
from megabase.datamodules.order.windows import PACKED
from megabase.datamodules.prepare.run import prepare
from tests.datamodules.loading import (
    EVERYTHING,
    LENGTH,
    ids_of_step,
    labelled,
    module,
    same,
    take,
)


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


def test_moves_strands_and_masks_are_independent(lambda_shards: ShardIndex) -> None:
    windows = module(lambda_shards, shift=50, reverse_complement=0.5).training_windows()
    keys = visit_keys(1, np.arange(66 * 100) // 66, np.tile(np.arange(66), 100))
    visits = windows.visits(np.full(6600, 30), keys)
    moves, turned = visits.starts - 30 * LENGTH, visits.reverse
    assert np.bincount(moves + 50).std() < 3 * (6600 / 101) ** 0.5 and len(np.unique(moves)) == 101
    assert abs(turned.mean() - 0.5) < 0.03
    masked = (mix(keys) >> np.uint64(63)).astype(np.int64)  # what decides about a window's first letter
    for one, other in ((moves, turned), (moves, masked), (turned, masked)):
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.05


@pytest.mark.parametrize("objective", ["causal", "masked"])
def test_other_strand_is_read_with_the_given_probability(
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
        .reverse.all()
    )


def test_packed_windows_are_records_with_separators_each_reversed_in_place(genomes: ShardIndex) -> None:
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


def test_evaluation_has_no_augmentation_and_says_what_is_in_lower_case(genomes: ShardIndex) -> None:
    plain = list(module(genomes, length=50, pack=True).some_validation(0))
    settings = EVERYTHING | {"length": 50, "on_error": "raise"}
    assert all(map(same, plain, module(genomes, **settings).some_validation(0)))
    # The batches say which letters are in lower case, whatever weight these have in training.
    assert all(batch.soft is not None and batch.softmask_weight == 0 for batch in plain)


def test_parts_of_the_validation_windows_hold_the_letters_that_are_scored(genomes: ShardIndex) -> None:
    for pack, most in ((True, 0), (True, 2), (False, 0)):
        data = module(genomes, length=50, pack=pack, min_real=0.0)
        batches = data.some_validation(most)
        expected = np.concatenate(
            [batch.widened().labels[batch.widened().labels != -100] for batch in batches]
        )
        read = [genomes.alphabet.encode(genomes.read(*part)) for part in data.validation_parts(most)]
        letters = np.concatenate(read)
        assert letters[letters >= FIRST_LETTER].tolist() == expected.tolist()


def test_mixture_is_read_in_its_proportions(genomes: ShardIndex) -> None:
    data = module(
        genomes, length=100, mixture={"a.fa": 1.0, "b.fa": 3.0}, global_batch=CYCLE, micro_batch=CYCLE
    )
    rows, _ = data.training_windows().plan.locate(take(data, 1)[0].samples.numpy())
    assert (genomes.segments.source[rows] == "b.fa").sum() == 3 * CYCLE // 4


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
def test_unreadable_windows_are_skipped_and_counted(
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


def test_augmentations_that_do_not_fit_the_alphabet_are_refused(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("all work and no play " * 100)
    index = prepare([text], tmp_path / "shards", alphabet="bytes", progress=False)
    assert take(module(index), 1)[0].codes.dtype == torch.int16
    with pytest.raises(
        DataError, match=r"data.reverse_complement 0.5: alphabet bytes has no reverse complement"
    ):
        module(index, reverse_complement=0.5)
    with pytest.raises(
        DataError, match=r"data.softmask_weight 0.5: lower case does not mark repeats in alphabet bytes"
    ):
        module(index, softmask_weight=0.5)
