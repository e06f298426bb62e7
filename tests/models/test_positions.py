"""Positions: tables that are added to the embedding, and rotary ones."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megabase.models import ReformerConfig, positions
from megabase.models.positions import build_positions, rotary


@pytest.mark.parametrize("max_length", [1, 2, 7, 64, 100, 1000])
def test_axial_positions_are_distinct_and_prefixes_agree(max_length):
    table = build_positions(ReformerConfig(vocab_size=9, dim=8, positions="axial", max_length=max_length))
    assert table is not None
    table_of_all = table(max_length)
    assert table_of_all.shape == (max_length, 8)
    assert table_of_all.unique(dim=0).shape[0] == max_length
    for length in {1, max_length // 2 or 1, max_length}:
        assert torch.equal(table(length), table_of_all[:length])
    assert sum(p.numel() for p in table.parameters()) <= 8 * 4 * math.isqrt(max_length) + 8


def test_axial_rows_and_columns_may_differ_in_width():
    config = ReformerConfig(
        vocab_size=9, dim=8, positions="axial", max_length=12, axial_shape=[3, 4], axial_dims=[2, 6]
    )
    table = build_positions(config)
    assert table is not None
    table_of_all = table(12).view(3, 4, 8)
    assert torch.equal(table_of_all[:, 0, :2], table_of_all[:, 3, :2])
    assert torch.equal(table_of_all[0, :, 2:], table_of_all[2, :, 2:])
    assert not torch.equal(table_of_all[0, 0, :2], table_of_all[1, 0, :2])
    assert not torch.equal(table_of_all[0, 0, 2:], table_of_all[0, 1, 2:])


def test_rotary_products_depend_on_distance_only():
    q, k = torch.randn(8), torch.randn(8)
    turned_q, turned_k = rotary(q.expand(20, 8)), rotary(k.expand(20, 8))
    products = turned_q @ turned_k.T
    torch.testing.assert_close(products[5:, 5:], products[:-5, :-5])
    torch.testing.assert_close(turned_q.norm(dim=-1), q.norm().expand(20))


class Widest(TorchDispatchMode):
    """Notes the size of the largest fp64 tensor that an operation returns."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype == torch.float64:
            self.numbers = max(self.numbers, result.numel())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rotary_tables_are_computed_in_pieces(monkeypatch, dtype):
    """The same bits, and no fp64 tensor of all positions: at 4 million, each would take 2 GB."""
    whole = positions._angles(7, 1000, 16, dtype, torch.device("cpu"))
    assert [table.shape for table in whole] == [(1000, 8)] * 2
    monkeypatch.setattr(positions, "PIECE", 64)
    positions._angles.cache_clear()
    with Widest() as widest:
        pieces = positions._angles(7, 1000, 16, dtype, torch.device("cpu"))
    positions._angles.cache_clear()
    assert all(torch.equal(*tables) for tables in zip(whole, pieces, strict=True))
    assert dtype == torch.float64 or widest.numbers == 64 * 8
