"""Counts of letters, against counting every base."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megabase.datamodules.index.letters import Letters
from tests.datamodules.order.made import Made, made

records = st.lists(st.text(alphabet="ACgtNN", max_size=40).map(str.encode), min_size=1, max_size=6)


@given(texts=records, data=st.data())
def test_letters_are_counted_in_any_part_of_any_row(texts: list[bytes], data: st.DataObject) -> None:
    letters = Letters(made([Made(text) for text in texts]))
    row = data.draw(st.integers(0, len(texts) - 1))
    start = data.draw(st.integers(0, len(texts[row])))
    length = data.draw(st.integers(0, len(texts[row]) - start))
    found = letters.count(np.array([row]), np.array([start]), length)
    assert found.tolist() == [length - texts[row][start : start + length].count(b"N")]
