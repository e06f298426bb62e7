"""Sums over bins, however the blocks cut them and whichever strand comes first."""

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from megabase.pipeline.errors import UserError
from megabase.pipeline.inference.pooling import Pool, Pooling

LENGTH = 23
STATES = torch.randn(LENGTH, 3, generator=torch.Generator().manual_seed(1))
LETTER = torch.ones(LENGTH, dtype=torch.bool)
LETTER[[0, 7, 8, 9, 10, 11, 12, 13, 20]] = False


def pooled(text: str, sizes: list[int], *, reverse: bool) -> tuple[np.ndarray, np.ndarray]:
    """Means and numbers of letters of all rows, from blocks of these sizes in the strand's order."""
    pool = Pool.parse(text)
    means = torch.full((pool.rows(LENGTH), 3), torch.inf, dtype=torch.float64)
    bases = torch.full((pool.rows(LENGTH),), -1)

    def write(number: int, some: Tensor, letters: Tensor) -> None:
        assert (bases[number : number + len(some)] == -1).all()
        means[number : number + len(some)], bases[number : number + len(some)] = some, letters

    pooling = Pooling(pool.part(LENGTH, reverse=reverse), write)
    borders = np.cumsum([0, *sizes])
    blocks = [(LENGTH - e, LENGTH - s) if reverse else (s, e) for s, e in itertools.pairwise(borders)]
    for start, end in blocks:
        pooling.add(start, STATES[start:end], LETTER[start:end])
    return means.numpy(), bases.numpy()


def expected(text: str, *, reverse: bool) -> tuple[np.ndarray, np.ndarray]:
    """The same from the definition."""
    kind, _, size = text.partition(":")
    center = (LENGTH - int(size or 1)) // 2
    rows = {
        "mean": [range(LENGTH)],
        "last": [[0 if reverse else LENGTH - 1]],
        "none": [[i] for i in range(LENGTH)],
        "center": [range(center, center + int(size or 1))],
        "bin": [range(i, min(i + int(size or 1), LENGTH)) for i in range(0, LENGTH, int(size or 1))],
    }[kind]
    means = []
    for row in rows:
        places = [i for i in row if LETTER[i] or kind in ("last", "none")]
        means.append(STATES[places].double().mean(0).numpy() if places else np.full(3, np.nan))
    return np.array(means), np.array([sum(bool(LETTER[i]) for i in row) for row in rows])


@pytest.mark.parametrize(
    "text", ["mean", "last", "none", "center:4", "center:23", "bin:1", "bin:2", "bin:4", "bin:9", "bin:40"]
)
@pytest.mark.parametrize("reverse", [False, True])
def test_pools_do_not_depend_on_the_blocks(text: str, reverse: bool) -> None:
    for sizes in ([23], [1] * 23, [4, 4, 4, 4, 4, 3], [10, 3, 10], [3, 1, 16, 2, 1]):
        means, bases = pooled(text, sizes, reverse=reverse)
        of, letters = expected(text, reverse=reverse)
        np.testing.assert_allclose(means, of, rtol=1e-12)
        np.testing.assert_array_equal(bases, letters)
    again, _ = pooled(text, [10, 3, 10], reverse=reverse)
    np.testing.assert_array_equal(again, pooled(text, [10, 3, 10], reverse=reverse)[0])


def test_a_bin_without_letters_is_nan() -> None:
    means, bases = pooled("bin:3", [23], reverse=False)
    assert np.isnan(means[3]).all() and bases[3] == 0
    assert np.isfinite(means[[0, 1, 2, 4, 5, 6, 7]]).all()


@pytest.mark.parametrize(
    "text", ["", "max", "mean:3", "bin", "bin:", "bin:0", "bin:-1", "center:x", "center:3:4", "bin:²"]
)
def test_a_pool_that_does_not_parse(text: str) -> None:
    with pytest.raises(UserError, match=f"--pool {text}: give mean, last"):
        Pool.parse(text)


def test_a_centre_longer_than_the_region() -> None:
    Pool.parse("center:23").check("one:0-23", LENGTH)
    Pool.parse("bin:24").check("one:0-23", LENGTH)
    with pytest.raises(UserError, match="--pool center:24: one:0-23 has only 23 bases"):
        Pool.parse("center:24").check("one:0-23", LENGTH)
