"""The order of windows, against definitions that hold everything in memory."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megabase.datamodules.config import CYCLE, mixture_quotas
from megabase.datamodules.errors import DataError
from megabase.datamodules.order.permutation import Permutation
from megabase.datamodules.order.training_order import Order, slots

keys = st.integers(-(2**70), 2**70)


def test_order_never_changes() -> None:
    """A run resumed by a later version must see the same windows: these numbers never change."""
    assert Permutation(1, 10)(np.arange(10)).tolist() == [0, 6, 1, 9, 8, 5, 4, 3, 7, 2]
    assert Order(5, (0, 1000)).of_step(3, 8)[0].tolist() == [
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
    epochs = Order(0, (0, n)).at(np.arange(draws * n))[0].reshape(draws, n)
    seen = Counter(map(tuple, epochs.tolist()))
    orders = math.factorial(n)
    assert len(seen) == orders
    expected = draws / orders
    chi_square = sum((count - expected) ** 2 / expected for count in seen.values())
    assert chi_square < orders - 1 + 5 * (2 * (orders - 1)) ** 0.5


@given(seed=keys, n=st.integers(1, 50), global_batch=st.integers(1, 70))
def test_every_epoch_has_every_window_once(seed: int, n: int, global_batch: int) -> None:
    steps = -(-3 * n // global_batch)
    stream = np.concatenate([Order(seed, (0, n)).of_step(step, global_batch)[0] for step in range(steps)])
    for epoch in range(3):
        assert np.array_equal(np.sort(stream[epoch * n : (epoch + 1) * n]), np.arange(n))


def test_epochs_and_seeds_differ() -> None:
    orders = {
        tuple(Order(seed, (0, 100)).of_step(epoch, 100)[0]) for seed in (0, 1, -1) for epoch in range(10)
    }
    assert len(orders) == 30


@given(ranks=st.integers(1, 8), micro_batch=st.integers(1, 5), turns=st.integers(1, 4))
def test_ranks_and_turns_share_out_the_global_batch(ranks: int, micro_batch: int, turns: int) -> None:
    batch = np.arange(ranks * micro_batch * turns)
    dealt = [batch[slots(turn, rank, ranks, micro_batch)] for turn in range(turns) for rank in range(ranks)]
    assert np.array_equal(np.concatenate(dealt), batch)


mixtures = st.lists(st.tuples(st.integers(1, 300), st.floats(0.1, 10)), min_size=2, max_size=6).map(
    lambda groups: Order(
        3, tuple(np.cumsum([0, *(size for size, _ in groups)]).tolist()), tuple(w for _, w in groups)
    )
)


@given(order=mixtures, start=st.integers(0, 50))
@settings(max_examples=30)
def test_a_mixture_is_exact_in_every_cycle(order: Order, start: int) -> None:
    samples, _ = order.at(CYCLE * start + np.arange(CYCLE))
    group = np.searchsorted(order.bounds, samples, side="right") - 1
    counts = np.bincount(group, minlength=len(order.weights))
    assert counts.tolist() == list(order.quotas)
    shares = np.array(order.weights) / sum(order.weights) * CYCLE
    assert (np.abs(counts - shares) < 1).all()


@given(order=mixtures)
@settings(max_examples=20)
def test_a_group_goes_through_all_its_windows_before_any_comes_again(order: Order) -> None:
    samples, epochs = order.at(np.arange(4 * CYCLE))
    for first, end in zip(order.bounds, order.bounds[1:], strict=False):
        mine = (samples >= first) & (samples < end)
        visits = list(zip(epochs[mine].tolist(), samples[mine].tolist(), strict=True))
        assert len(set(visits)) == len(visits)
        whole = len(visits) // (end - first)
        for epoch in range(whole):
            assert sorted(s for e, s in visits if e == epoch) == list(range(first, end))
        assert epochs[mine].max() == (len(visits) - 1) // (end - first)


def test_a_mixture_does_not_depend_on_how_it_is_cut() -> None:
    order = Order(7, (0, 10, 500, 507), (1.0, 5.0, 2.0))
    whole = order.at(np.arange(3000))
    for size in (1, 7, 1000):
        parts = [order.of_step(step, size) for step in range(min(3000 // size, 100))]
        for number in range(2):
            joined = np.concatenate([part[number] for part in parts])
            assert np.array_equal(joined, whole[number][: len(joined)])


def test_cycles_and_groups_are_in_different_orders() -> None:
    order = Order(7, (0, 512, 1024), (1.0, 1.0))
    samples, epochs = order.at(np.arange(2 * CYCLE))
    first, second = (samples[:CYCLE] < 512), (samples[CYCLE:] < 512)
    assert 400 < (first == second).sum() < 624
    one, other = samples[:CYCLE][first], samples[:CYCLE][~first] - 512
    assert not np.array_equal(one, other)
    assert set(epochs[:CYCLE].tolist()) == {0}


def test_order_of_a_mixture_never_changes() -> None:
    samples, epochs = Order(5, (0, 40, 1000), (1.0, 1.0)).at(np.arange(1_000_000, 1_000_010))
    assert samples.tolist() == [27, 374, 575, 239, 725, 120, 54, 404, 650, 397]
    assert epochs.tolist() == [12502, 520, 520, 520, 520, 520, 521, 520, 520, 520]


def test_a_weight_below_one_position_in_a_cycle_is_refused() -> None:
    with pytest.raises(DataError, match=r"data\.mixture: weight 0.0001 is less than 1/1024 of all weights"):
        mixture_quotas([1.0, 0.0001])
