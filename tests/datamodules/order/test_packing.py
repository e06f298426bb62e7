"""Packing of short records, against the tape written out."""

import numpy as np
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from megabase.datamodules.index.letters import Letters
from megabase.datamodules.order.packing import Tape
from megabase.datamodules.order.planning import plan_windows
from megabase.datamodules.order.windows import PACKED, WindowPlan
from tests.datamodules.order.made import Made, made


def letters_of(plan: WindowPlan, ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """Letters in each window."""
    return plan.count_letters(*plan.locate(ids))


def listed(plan: WindowPlan) -> list[tuple[int, int]]:
    """Row and start of every window."""
    rows, starts = plan.locate(np.arange(len(plan)))
    return list(zip(rows.tolist(), starts.tolist(), strict=True))


records = st.lists(st.text(alphabet="ACgtNN", max_size=40).map(str.encode), min_size=1, max_size=6)


@given(texts=records, length=st.integers(1, 60), groups=st.integers(1, 3))
def test_a_tape_is_the_short_records_with_separators(texts: list[bytes], length: int, groups: int) -> None:
    short = [Made(text[: length - 1] or b"A"[: length - 1]) for text in texts]
    short = [row for row in short if row.bases]
    assume(short)
    segments = made(short)
    members = [np.arange(len(short))[part::groups] for part in range(groups)]
    expected = b"".join(
        joined + b"_" * (-len(joined) % length)
        for joined in (b"|".join(short[row].bases for row in rows) for rows in members)
    )
    tape = Tape(Letters(segments), segments.length, members, length)
    assert tape.windows[:, 1].sum() * length == len(expected)
    seen = bytearray(b"_" * len(expected))
    for start in range(0, len(expected), length):
        window = expected[start : start + length]
        for piece in tape.pieces(start):
            assert piece.at >= 0 and piece.at + piece.length <= length
            bases = short[piece.row].bases[piece.start : piece.start + piece.length]
            assert len(bases) == piece.length > 0
            seen[start + piece.at : start + piece.at + piece.length] = bases
        for at in tape.separators(start):
            seen[start + at] = ord("|")
        assert tape.count(np.array([start])).tolist() == [sum(byte in b"ACgt" for byte in window)]
    assert seen == expected


def test_packing_takes_short_segments_only() -> None:
    segments = made([Made(b"A" * size) for size in (3, 10, 2, 4, 25)])
    plan = plan_windows(segments, "train", 10, pack=True)
    assert listed(plan) == [(1, 0), (4, 0), (4, 10), (PACKED, 0)]  # a second one would hold 1 base
    assert letters_of(plan, np.arange(4)).tolist() == [10, 10, 10, 8]
    assert plan.left_out == 0
    without = plan_windows(segments, "train", 10)
    assert listed(without) == listed(plan)[:3]
    assert without.left_out == 9


def test_the_last_window_of_a_tape_must_be_real_enough() -> None:
    segments = made([Made(b"A" * 9), Made(b"A" * 9)])
    assert listed(plan_windows(segments, "train", 10, 0.9, pack=True)) == [(PACKED, 0), (PACKED, 10)]
    segments = made([Made(b"A" * 9), Made(b"A" * 8)])
    assert listed(plan_windows(segments, "train", 10, 0.9, pack=True)) == [(PACKED, 0)]
