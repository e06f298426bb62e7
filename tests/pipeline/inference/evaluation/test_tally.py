"""Means over windows and their bootstrap intervals."""

import math

import numpy as np
import pytest

from megabase.pipeline.inference.evaluation.tally import Tally, mean


def made(windows: int, seed: int = 0) -> Tally:
    drawn = np.random.default_rng(seed)
    bases = drawn.integers(50, 150, (windows, 2))
    return Tally(np.arange(windows), bases * drawn.normal(1.3, 0.2, (windows, 2)), bases)


@pytest.mark.slow
def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    covered = 0
    for seed in range(100):
        found = made(60, seed).mean(0)
        assert found is not None and found.low < found.value < found.high
        covered += found.low < 1.3 / math.log(2) < found.high
    assert 88 <= covered <= 100
    of_many = made(6000).mean(0)
    assert of_many is not None and of_many.high - of_many.low < 0.03


def test_the_mean_weighs_bases_not_windows() -> None:
    found = mean(np.array([10.0, 300.0]), np.array([10, 100]))
    assert found is not None and found.bases == 110
    assert found.value == pytest.approx(310 / 110 / math.log(2))
    single = mean(np.array([10.0]), np.array([10]))
    assert single is not None and single.low == single.value == single.high
    assert mean(np.array([0.0]), np.array([0])) is None


def test_tallies_of_ranks_merge_to_that_of_one_process() -> None:
    whole = made(7)
    order = np.array([3, 0, 6, 1])
    rest = np.array([2, 4, 5])
    filler = Tally(np.array([-1]), np.full((1, 2), 9.0), np.ones((1, 2), np.int64))
    parts = [Tally(whole.samples[of], whole.nats[of], whole.bases[of]) for of in (order, rest)]
    merged = Tally.merged([parts[1], filler, parts[0]])
    assert np.array_equal(merged.samples, whole.samples)
    assert np.array_equal(merged.nats, whole.nats) and np.array_equal(merged.bases, whole.bases)
    assert merged.mean(1) == whole.mean(1)


def test_a_gain_is_paired_by_window() -> None:
    without = made(40)
    better = Tally(without.samples, without.nats - 0.5 * without.bases, without.bases)
    gain = better.gain(0, without, 0)
    assert gain is not None
    # Every window gains the same, so the interval has no width, however much the windows differ.
    assert [gain.low, gain.value, gain.high] == pytest.approx([0.5 / math.log(2)] * 3)
