"""Ranges of integers, against sets."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megabase.datamodules.order.ranges import counted_up, integers, ranges_of, united

pairs = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 9)), max_size=12).map(
    lambda pairs: np.array([(first, first + size) for first, size in pairs], np.int64).reshape(-1, 2)
)


@given(ranges=pairs)
def test_united_ranges_hold_the_same_integers_and_do_not_touch(ranges: np.ndarray) -> None:
    ranges = ranges[ranges[:, 1] > ranges[:, 0]]
    held = {number for first, end in ranges.tolist() for number in range(first, end)}
    found = united(ranges)
    listed = [number for part in integers(found) for number in part.tolist()]
    assert listed == sorted(held)
    assert (found[1:, 0] > found[:-1, 1]).all()
    assert np.array_equal(ranges_of(np.array(listed, np.int64)), found)


@given(ranges=pairs)
def test_counting_up_goes_through_ranges_in_their_order(ranges: np.ndarray) -> None:
    expected = [number for low, high in ranges.tolist() for number in range(low, high)]
    assert counted_up(ranges[:, 0], ranges[:, 1]).tolist() == expected
