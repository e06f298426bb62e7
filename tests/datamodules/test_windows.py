"""Order and planning, against definitions that hold everything in memory."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.errors import DataError
from datamodules.index import Segments, ShardIndex
from datamodules.windows import Permutation, WindowPlan, samples_at, samples_of_step, slots

keys = st.integers(-(2**70), 2**70)


@given(key=keys, n=st.integers(1, 3000))
def test_a_permutation_is_a_bijection(key: int, n: int) -> None:
    assert np.array_equal(np.sort(Permutation(key, n)(np.arange(n))), np.arange(n))


@given(key=keys, n=st.integers(2**31, 2**62), data=st.data())
@settings(max_examples=30)
def test_huge_domains_stay_inside_and_apart(key: int, n: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, n - 1000))
    images = Permutation(key, n)(np.arange(start, start + 1000))
    assert images.min() >= 0
    assert images.max() < n
    assert len(np.unique(images)) == 1000


def test_positions_are_computed_one_by_one_as_together() -> None:
    permutation = Permutation(7, 1000)
    together = permutation(np.arange(1000).reshape(10, 100))
    assert together.shape == (10, 100)
    assert [int(permutation(np.array([p]))[0]) for p in range(1000)] == together.ravel().tolist()


def test_the_order_is_frozen() -> None:
    """A run resumed by a later version must see the same windows: these numbers never change."""
    assert Permutation(1, 10)(np.arange(10)).tolist() == [0, 6, 1, 9, 8, 5, 4, 3, 7, 2]
    assert samples_of_step(seed=5, step=3, global_batch=8, n=1000).tolist() == [
        225,
        699,
        706,
        747,
        693,
        347,
        62,
        945,
    ]


@pytest.mark.parametrize("n", [3, 4, 5, 6])
def test_all_orders_are_equally_likely(n: int) -> None:
    """Chi-square over all n! orders of small sets, where a poor Feistel network would show first."""
    draws = 20_000
    epochs = samples_at(0, np.arange(draws * n), n).reshape(draws, n)
    seen = Counter(map(tuple, epochs.tolist()))
    orders = math.factorial(n)
    assert len(seen) == orders
    expected = draws / orders
    chi_square = sum((count - expected) ** 2 / expected for count in seen.values())
    assert chi_square < orders - 1 + 5 * (2 * (orders - 1)) ** 0.5


def test_neighbours_end_up_anywhere() -> None:
    """Mean distance of the images of neighbours in a random permutation is n / 3."""
    images = Permutation(3, 100_000)(np.arange(100_000))
    assert abs(np.abs(np.diff(images)).mean() / 100_000 - 1 / 3) < 0.01
    assert abs(np.corrcoef(np.arange(100_000), images)[0, 1]) < 0.02


def test_impossible_domains_are_refused() -> None:
    with pytest.raises(ValueError, match="0 elements"):
        Permutation(0, 0)
    for outside in (-1, 5):
        with pytest.raises(IndexError):
            Permutation(0, 5)(np.array([0, outside]))


@given(seed=keys, n=st.integers(1, 50), global_batch=st.integers(1, 70))
def test_every_epoch_has_every_window_once(seed: int, n: int, global_batch: int) -> None:
    steps = -(-3 * n // global_batch)
    stream = np.concatenate([samples_of_step(seed, step, global_batch, n) for step in range(steps)])
    for epoch in range(3):
        assert np.array_equal(np.sort(stream[epoch * n : (epoch + 1) * n]), np.arange(n))


def test_epochs_and_seeds_differ() -> None:
    orders = {tuple(samples_of_step(seed, epoch, 100, 100)) for seed in (0, 1, -1) for epoch in range(10)}
    assert len(orders) == 30


@given(ranks=st.integers(1, 8), micro_batch=st.integers(1, 5), turns=st.integers(1, 4))
def test_ranks_and_turns_share_out_the_global_batch(ranks: int, micro_batch: int, turns: int) -> None:
    batch = np.arange(ranks * micro_batch * turns)
    dealt = [batch[slots(turn, rank, ranks, micro_batch)] for turn in range(turns) for rank in range(ranks)]
    assert np.array_equal(np.concatenate(dealt), batch)


def naive_windows(index: ShardIndex, split: str, length: int, min_real: float) -> list[tuple[int, int, int]]:
    """(row, start, letters) of every window, found by looking at every base."""
    found = []
    for row in index.segments.rows_of(split):
        for start in range(0, int(index.segments.length[row]) - length + 1, length):
            bases = index.read(row, start, length)
            letters = int((index.alphabet.encode(bases) >= 5).sum())
            if letters >= max(min_real * length, 1):
                found.append((int(row), start, letters))
    return found


@given(
    split=st.sampled_from(["train", "valid", "test"]),
    length=st.integers(1, 700),
    min_real=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
)
@settings(max_examples=60, deadline=None)
def test_the_plan_is_what_looking_at_every_base_finds(
    gappy_shards: ShardIndex, split: str, length: int, min_real: float
) -> None:
    expected = naive_windows(gappy_shards, split, length, min_real)
    if not expected:
        with pytest.raises(DataError):
            WindowPlan.of(gappy_shards.segments, split, length, min_real)
        return
    plan = WindowPlan.of(gappy_shards.segments, split, length, min_real)
    ids = np.arange(len(plan))
    rows, starts = plan.locate(ids)
    assert list(zip(rows, starts, plan.letters(ids), strict=True)) == expected


def test_no_base_of_one_split_is_in_another_s_windows(gappy_shards: ShardIndex) -> None:
    segments = gappy_shards.segments
    owner: dict[tuple[str, int], str] = {}
    for split in segments.splits():
        plan = WindowPlan.of(segments, split, 37, 0.0)
        for row, start in zip(*plan.locate(np.arange(len(plan))), strict=True):
            first = int(segments.start[row] + start)
            for base in range(first, first + 37):
                assert owner.setdefault((segments.record[row], base), split) == split
                assert segments.start[row] <= base < segments.start[row] + segments.length[row]


def test_lambda_s_windows(lambda_shards: ShardIndex) -> None:
    plan = WindowPlan.of(lambda_shards.segments, "train", 1024)
    assert len(plan) == 33_952 // 1024
    assert [int(x[0]) for x in plan.locate(np.array([2]))] == [0, 2048]
    assert plan.letters(np.arange(len(plan))).sum() == 1024 * len(plan)
    for outside in (-1, len(plan)):
        with pytest.raises(IndexError):
            plan.locate(np.array([outside]))


def test_a_human_sized_plan_needs_little_memory() -> None:
    """24 chromosomes of 130 Mb with N at both ends and a centromere of 3 Mb: 3 million windows of 1024."""
    rows, size = 24, 130_000_000
    gaps = np.tile([[0, 10_000], [60_000_000, 3_000_000], [size - 10_000, 10_000]], (rows, 1))
    text = np.full(rows, "x", object)
    number = np.zeros(rows, np.int64)
    segments = Segments(
        text,
        np.full(rows, "train", object),
        number,
        number + size,
        text,
        number,
        number.astype(np.uint32),
        gaps,
        np.arange(rows + 1) * 3,
    )
    plan = WindowPlan.of(segments, "train", 1024)
    assert 2_970_000 < len(plan) < 2_980_000
    held = sum(getattr(plan, name).nbytes for name in ("rows", "first", "gapped", "missing", "skips"))
    assert held < 3_000_000
    assert plan.letters(np.arange(len(plan))).sum() > 0.999 * 1024 * len(plan)


@pytest.mark.parametrize(
    ("split", "length", "min_real", "message"),
    [
        (
            "train",
            40_000,
            0.5,
            r"split 'train' has no window of data.length 40000: .* of 'gi\|.*\|', has 33952 bases: lower data.length",
        ),
        ("dev", 10, 0.5, r"split 'dev' is not in the shards \(they hold test, train, valid\)"),
        ("train", 0, 0.5, "data.length 0: must be at least 1"),
        ("train", 10, 1.5, "data.min_real 1.5: must lie between 0 and 1"),
    ],
)
def test_plans_without_a_window_are_refused(
    lambda_shards: ShardIndex, split: str, length: int, min_real: float, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        WindowPlan.of(lambda_shards.segments, split, length, min_real)


def test_a_split_of_gaps_only_is_refused(gappy_shards: ShardIndex) -> None:
    with pytest.raises(
        DataError, match="split 'train': none of its 2 windows of 3000 bases has 100% letters"
    ):
        WindowPlan.of(gappy_shards.segments, "train", 3000, 1.0)
