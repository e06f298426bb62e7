"""What benchmarks/memory.py computes from its points."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.memory import Step, slope


def point(positions: int, held: int | None) -> dict[str, Any]:
    """A row of the benchmark; None: it ran out of memory."""
    return {"positions": positions} | ({"left_out": "out of memory"} if held is None else {"bytes": held})


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([point(100, 5000), point(300, 13000)], 4.0),  # 1,000 bytes do not grow
        ([point(300, 13000), point(100, 5000), point(200, 7000)], 4.0),  # shortest and longest, in any order
        ([point(100, 5000), point(200, 9000), point(400, None)], 4.0),
        ([point(100, 5000), point(200, None)], None),
    ],
)
def test_the_slope_is_what_each_position_and_channel_adds(
    points: list[dict[str, Any]], expected: float | None
) -> None:
    assert slope(points, dim=10) == expected


@pytest.mark.slow
def test_weights_and_gradients_are_subtracted_and_a_rank_of_several_trains() -> None:
    step = Step(dim=16, depth=2, heads=2, dtype="bf16", device="cpu", sequence_ranks=2)
    whole = Step(dim=16, depth=2, heads=2, dtype="fp32", device="cpu", sequence_ranks=1)
    assert step.weights_bytes("local+lsh", 64) * 2 == whole.weights_bytes("local+lsh", 64) > 4 * 2 * 16 * 16
    step.prepare("local+lsh", 64, seed=0)()
