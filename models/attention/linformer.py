"""Linformer attention (Wang et al. 2020, arXiv 2006.04768): keys and values are projected along the length.

Keys (length, d) become E · keys, (size, d), values F · values, with E and F learned (section 4): a query attends to
`size` slots instead of `length` positions. E and F have a column for every position, so the length is fixed. A slot
mixes all positions, so it cannot be causal. Rotary positions are not used: E and F distinguish positions already, and
a sum over all of them would mix the rotations.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megabase.models.attention.full import dropped_attention
from megabase.models.attention.heads import SeparateAttention
from megabase.models.attention.kernels.inputs import PairDropout
from megabase.models.call import Call
from megabase.models.config import ConfigError, ReformerConfig


def linformer_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    to_keys: Tensor,
    to_values: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    dropout: PairDropout | None = None,
) -> Tensor:
    """softmax(q · (E k) / √d) (F v).

    Args:
        q: queries (batch, heads, length, d).
        k: keys, of the same shape.
        v: values, of the same shape.
        to_keys: E, (size, length) for all heads or (heads, size, length).
        to_values: F, shaped like E; None: E is used for values too.
        mask: (batch, length) bool, True where a position is real. Others add nothing to any slot, and their output is
            zero.
        dropout: dropout of attention weights; it has batch × heads rows.

    Returns:
        (batch, heads, length, d).

    Raises:
        ConfigError: a projection does not fit the length.
    """
    length = q.shape[2]
    for name, matrix in (("to_keys", to_keys), ("to_values", to_keys if to_values is None else to_values)):
        if matrix.shape[-1] != length:
            raise ConfigError(
                f"a sequence of {length} tokens does not fit a Linformer projection {name} made for "
                f"{matrix.shape[-1]} tokens: cut it, or pad it (with a mask), to that length"
            )
    if mask is not None:
        k, v = (x.masked_fill(~mask[:, None, :, None], 0.0) for x in (k, v))
    if to_values is None:
        slots_k, slots_v = _project(to_keys, torch.cat((k, v), dim=-1)).split(k.shape[-1], dim=-1)
    else:
        slots_k, slots_v = _project(to_keys, k), _project(to_values, v)
    if dropout is None:
        y = F.scaled_dot_product_attention(q, slots_k, slots_v)
    else:
        seen = torch.ones((), dtype=torch.bool, device=q.device)
        y = dropped_attention(q, slots_k, slots_v, seen, dropout)
    return y if mask is None else y.masked_fill(~mask[:, None, :, None], 0.0)


def _project(matrix: Tensor, x: Tensor) -> Tensor:
    """(size, length) or (heads, size, length) times x (batch, heads, length, d): (batch, heads, size, d)."""
    # matmul would copy the matrix for every sequence of the batch.
    return torch.einsum("sl,bhld->bhsd" if matrix.dim() == 2 else "hsl,bhld->bhsd", matrix, x)


class LinformerAttention(SeparateAttention):
    """The layer: projections of channels and of the length, attention to the slots, output projection."""

    def __init__(self, config: ReformerConfig, layer: int) -> None:
        super().__init__(config, layer)
        assert config.max_length is not None, "validated"
        heads = (config.heads,) if config.linformer.share == "none" else ()
        shape = (*heads, config.linformer.size, config.max_length)
        # Slots then have unit variance, like keys and values.
        scale = config.max_length**-0.5
        self.to_keys = nn.Parameter(torch.randn(shape) * scale)
        self.to_values = (
            None if config.linformer.share == "keyvalue" else nn.Parameter(torch.randn(shape) * scale)
        )

    @property
    def in_groups(self) -> bool:
        return False

    def positioned(self, q: Tensor, k: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Queries and keys as they are: without rotary positions."""
        return q, k

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        dropout = self.pair_dropout(call, v.shape[0], v.device)
        to_keys: Tensor = self.to_keys
        to_values: Tensor | None = self.to_values
        if self.config.linformer.share == "none":
            assert to_values is not None
            to_keys, to_values = to_keys[call.heads], to_values[call.heads]
        return linformer_attention(q, k, v, to_keys, to_values, mask=call.mask, dropout=dropout)
