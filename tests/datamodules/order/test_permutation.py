"""The keyed permutation, against definitions that hold everything in memory."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megabase.datamodules.order.permutation import Permutation

keys = st.integers(-(2**70), 2**70)


@given(key=keys, n=st.integers(1, 3000))
def test_a_permutation_is_a_bijection(key: int, n: int) -> None:
    assert np.array_equal(np.sort(Permutation(key, n)(np.arange(n))), np.arange(n))


@given(key=keys, n=st.integers(2**31, 2**62), data=st.data())
@settings(max_examples=30)
def test_images_in_huge_domains_are_inside_and_distinct(key: int, n: int, data: st.DataObject) -> None:
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


def test_neighbours_are_spread_evenly() -> None:
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
