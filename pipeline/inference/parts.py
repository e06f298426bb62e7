"""The parts of windows whose bases are scored apart: positions in the window, and letters in lower and upper case."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

FIRST_BIN = 16
LOWER, UPPER = "lower case", "upper case"


def position_bins(length: int) -> list[tuple[int, int]]:
    """[start, end) of the bins of positions: FIRST_BIN bases, then each as long as all before it."""
    edges = [0]
    while edges[-1] < length:
        edges.append(min(max(FIRST_BIN, 2 * edges[-1]), length))
    return list(itertools.pairwise(edges))


def part_names(length: int, *, cases: bool) -> list[str]:
    """Names of the parts of a window, as they appear in the journal.

    Args:
        length: of a window.
        cases: whether lower case marks repeats in the alphabet.
    """
    bins = [f"from_{start}" for start, _ in position_bins(length)]
    return [*bins, *(case.replace(" ", "_") for case in (LOWER, UPPER) if cases)]


def part_sums(
    nats: Tensor, labelled: Tensor, lower: Tensor | None, start: int = 0, whole: int | None = None
) -> Tensor:
    """Nats and number of bases of every part, over a batch.

    Args:
        nats: (batch, length) of every base, 0 without a label.
        labelled: (batch, length) bool, whether a base has a label.
        lower: (batch, length) bool, whether it is in lower case; None: the alphabet has no cases.
        start: the position in the window of the first base.
        whole: length of the window; None: `length`.

    Returns:
        (parts, 2) fp64, in the order of `part_names`.
    """
    both = torch.stack((nats.double(), labelled.double()), dim=-1)
    by_position = both.sum(dim=0)
    bins = position_bins(nats.shape[1] if whole is None else whole)
    found = [by_position[max(0, first - start) : max(0, end - start)].sum(dim=0) for first, end in bins]
    if lower is not None:
        found += [both[lower].sum(dim=0), both[~lower].sum(dim=0)]
    return torch.stack(found)
