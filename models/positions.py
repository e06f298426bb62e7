"""Positions of tokens: rotary, axial, learned, or none.

Learned and axial positions are added to the embedding. Rotary positions rotate queries and keys in local, full and
performer attention. LSH attention compares content alone: it gets order only from the layers before it.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from megabase.models import fused
from megabase.models.config import ReformerConfig

ROTARY_BASE = 10_000.0
"""Ratio of the longest rotary wavelength to the shortest (Su et al. 2021)."""

PIECE = 1 << 16
"""Positions whose angles are computed in fp64 at a time."""


class LearnedPositions(nn.Module):
    """One vector for each position up to max_length."""

    def __init__(self, config: ReformerConfig) -> None:
        super().__init__()
        assert config.max_length is not None
        self.table = nn.Parameter(torch.randn(config.max_length, config.dim) * 0.1)

    def forward(self, length: int, start: int = 0) -> Tensor:
        """The vectors (length, dim) of the positions from `start` on."""
        return self.table[start : start + length]


class AxialPositions(nn.Module):
    """Vectors for a grid that is laid over the sequence row by row (trax's axial position encoding).

    Position (r, c) has the vector of row r beside that of column c, each dim / 2 wide (or as `axial_dims` says). So
    rows · columns positions need (rows + columns) · dim / 2 weights.
    """

    def __init__(self, config: ReformerConfig) -> None:
        super().__init__()
        rows, columns = config.axial
        row, column = config.axial_widths
        self.rows = nn.Parameter(torch.randn(rows, row) * 0.1)
        self.columns = nn.Parameter(torch.randn(columns, column) * 0.1)

    def forward(self, length: int, start: int = 0) -> Tensor:
        """The vectors (length, dim) of the positions from `start` on."""
        columns = self.columns.shape[0]
        first, last = start // columns, -(-(start + length) // columns)
        rows = self.rows[first:last, None].expand(-1, columns, -1)
        grid = torch.cat((rows, self.columns.expand(last - first, -1, -1)), dim=-1)
        start -= first * columns
        return grid.flatten(0, 1)[start : start + length]


def build_positions(config: ReformerConfig) -> nn.Module | None:
    """The module whose vectors are added to the embedding, or None for the settings `rotary` and `none`."""
    if config.positions == "learned":
        return LearnedPositions(config)
    if config.positions == "axial":
        return AxialPositions(config)
    return None


def rotary(x: Tensor, start: int = 0) -> Tensor:
    """Rotate the channel pairs (c, c + d/2) by position · ROTARY_BASE^(−2c/d) radians (Su et al. 2021).

    The product of two rotated vectors depends on the distance between their positions only. Norms do not change.

    Args:
        x: (..., length, d).
        start: position of the first vector.
    """
    cos, sin = _angles(start, *x.shape[-2:], x.dtype, x.device)
    if fused.supports(x) and x.dim() == 4:
        return fused.turn(x, cos, sin)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


@functools.lru_cache(maxsize=1)
def _angles(
    start: int, length: int, d: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """cos and sin, (length, d / 2), of every position's angles. All layers need the same: the last result is cached."""
    wide = torch.float64 if device.type != "mps" else torch.float32
    with torch.inference_mode(False):
        waves = ROTARY_BASE ** (-torch.arange(0, d, 2, device=device, dtype=wide) / d)
        cos, sin = (torch.empty(length, len(waves), device=device, dtype=dtype) for _ in range(2))
        for first in range(0, length, PIECE):
            rows = slice(first, min(first + PIECE, length))
            places = torch.arange(start + rows.start, start + rows.stop, device=device, dtype=wide)
            angles = torch.outer(places, waves)
            cos[rows], sin[rows] = angles.cos(), angles.sin()
        return cos, sin
