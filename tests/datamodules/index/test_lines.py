"""Bases stored in lines, against the text written out."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megabase.datamodules.index.lines import byte_of, without_line_ends


@given(
    text=st.binary(min_size=1, max_size=60).map(lambda text: bytes(65 + byte % 20 for byte in text)),
    line_bases=st.integers(1, 20),
    end=st.sampled_from([b"\n", b"\r\n"]),
    data=st.data(),
)
def test_any_part_of_the_lines_gives_its_bases(
    text: bytes, line_bases: int, end: bytes, data: st.DataObject
) -> None:
    written = end.join(text[at : at + line_bases] for at in range(0, len(text), line_bases))
    line_bytes = line_bases + len(end)
    first = data.draw(st.integers(0, len(text) - 1))
    last = data.draw(st.integers(first, len(text) - 1))
    low, high = byte_of(np.array([first, last]), line_bases, line_bytes).tolist()
    assert (written[low], written[high]) == (text[first], text[last])
    span = np.frombuffer(written, np.uint8)[low : high + 1]
    assert without_line_ends(span, first % line_bases, line_bases, line_bytes) == text[first : last + 1]


def test_without_lines_a_base_is_a_byte() -> None:
    assert byte_of(np.array([0, 7]), 0, 0).tolist() == [0, 7]
