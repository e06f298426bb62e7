"""The parts of windows that are scored apart."""

import torch

from megabase.pipeline.inference.parts import part_names, part_sums, position_bins


def test_bins_of_positions_double() -> None:
    assert position_bins(100) == [(0, 16), (16, 32), (32, 64), (64, 100)]
    assert position_bins(10) == [(0, 10)]
    assert position_bins(64)[-1] == (32, 64)


def test_sums_are_in_the_order_of_the_names() -> None:
    nats = torch.arange(80.0).view(2, 40)
    labelled = nats != 3
    nats = nats * labelled
    lower = nats >= 70
    sums = part_sums(nats, labelled, lower)
    assert part_names(40, cases=True) == ["from_0", "from_16", "from_32", "lower_case", "upper_case"]
    assert part_names(40, cases=False) == ["from_0", "from_16", "from_32"]
    assert sums[:, 1].tolist() == [31, 32, 16, 10, 69]
    assert sums[2, 0] == sum(range(32, 40)) + sum(range(72, 80))
    assert sums[3, 0] == sum(range(70, 80))
    assert torch.equal(sums[:3].sum(0), sums[3:].sum(0))
    assert torch.equal(part_sums(nats, labelled, None), sums[:3])
