"""Pictures: labels do not overlap."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from megabase.pipeline.bench import draw


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0.01, 0.1)), min_size=1, max_size=8))
def test_labels_do_not_overlap(labels):
    wanted, heights = [w for w, _ in labels], [h for _, h in labels]
    places = draw.spread(wanted, heights)
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    for below, above in pairwise(order):
        assert places[above] - places[below] >= (heights[below] + heights[above]) / 2 - 1e-9
