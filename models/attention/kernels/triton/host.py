"""The functions of the Triton kernels that dispatch calls. Triton is imported when one of them first computes.

Operands are bf16, fp16 or fp32 (fp32 as three products of tf32), softmax and sums fp32. docs/kernels.md has the reasons
and the figures. Without a GPU the kernels run in Triton's interpreter (TRITON_INTERPRET=1): correct, and slow.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megabase.models.attention.kernels.inputs import PairDropout, Rotations, Rule, SortedOrder, row_mask
from megabase.models.config import ConfigError
from megabase.models.gpu import DTYPES, INTERPRETED, available

WIDEST = 128
"""Largest width of q, k and v: beyond it the tiles of the backward pass do not fit into registers."""


def supports(q: Tensor, v: Tensor) -> bool:
    """Whether `sorted_attention` computes with such tensors: their device, dtypes and widths."""
    if not (q.is_cuda or INTERPRETED) or not available():
        return False
    return all(x.dtype in DTYPES and x.shape[-1] <= WIDEST for x in (q, v))


def sorted_attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor,
    order: SortedOrder,
    rule: Rule,
    dropout: PairDropout | None = None,
    *,
    together: bool = False,
) -> Tensor:
    """The same as `reference.sorted_attention`. Products in the inputs' dtype, softmax and sums in fp32.

    Args:
        q: (rows, length, d), with any strides of rows and positions; so k and v.
        k: Keys like q. None: keys are the queries scaled to unit length (`dispatch.unit_keys`), and are never written
            to memory.
        v: (rows, length, d_v).
        order: The sorted order of the rows; its tensors may have any integer dtype.
        rule: Which keys a query attends to.
        dropout: Dropout of attention weights.
        together: Compute all rounds in one launch, and combine them in a second. Otherwise one launch for each round.

    Returns:
        (rows, length, d_v) in v's dtype and strides. The gradients have the strides of q, k and v.

    Raises:
        ConfigError: `supports` is false for the tensors, or q and k differ in dtype.
    """
    if not supports(q, v) or (k is not None and q.dtype != k.dtype):
        raise ConfigError(
            f"the Triton kernels take bf16, fp16 and fp32 of width {WIDEST} at the most, on a CUDA device, q and k of "
            f"one dtype; these are q {q.dtype}, k {q.dtype if k is None else k.dtype}, v {v.dtype}, widths "
            f"{q.shape[-1]} and {v.shape[-1]}, on {q.device}: take backend=chunked"
        )
    from megabase.models.attention.kernels.triton.launch import SortedAttention
    from megabase.models.attention.kernels.triton.together.launch import SortedAttentionTogether

    # A single round has nothing to combine: one launch either way.
    function = SortedAttentionTogether if together and order.positions.shape[1] > 1 else SortedAttention
    k = None if k is None else _with_dense_rows(k)
    return function.apply(_with_dense_rows(q), k, _with_dense_rows(v), order, rule, dropout)


def rotate_and_hash(x: Tensor, rotations: Rotations) -> Tensor:
    """Buckets of x (batch, heads, length, d): (batch, heads, rounds, length) int32.

    The same as `reference.rotate_and_hash`, up to rounding. The rotations may be on any device.

    Raises:
        ConfigError: There is no CUDA device.
    """
    return _hash(x, rotations, None, torch.int32)


def sort_by_hash(
    x: Tensor, rotations: Rotations, mask: Tensor | None = None, *, together: bool = False
) -> SortedOrder:
    """Hash x (batch, heads, length, d) and sort.

    Buckets are sorted in the smallest integer type that holds them: a radix sort passes once over keys of 8 bits.

    Args:
        x: Any float dtype.
        rotations: On any device.
        mask: (batch, length) bool, True where a position is real. The others come last, in the order of their
            positions, in a bucket of their own.
        together: For `sorted_attention` with together=True and queries x: with key_scales, in fewer launches.

    Returns:
        The order of batch × heads rows, in int32; if `together`, as the sort returns it.

    Raises:
        ConfigError: There is no CUDA device.
    """
    n_buckets = rotations.n_buckets
    small = next(t for t in (torch.uint8, torch.int16, torch.int32) if n_buckets <= torch.iinfo(t).max)
    tables = None
    if together:
        scales = torch.empty(x.shape[:3], dtype=torch.float32, device=x.device).flatten(0, 1)
        tables = scales, torch.empty(len(scales), dtype=torch.int32, device=x.device)
    buckets = _hash(x, rotations, mask, small, tables).flatten(0, 1)
    sorted_buckets, positions = torch.sort(buckets, dim=-1, stable=True)
    if tables is not None and mask is None:
        real_lengths = tables[1]
    else:
        real_lengths = SortedOrder.count_real(row_mask(mask, x.shape[1]), positions)
    if tables is not None:
        return SortedOrder(positions, sorted_buckets, real_lengths, key_scales=tables[0])
    return SortedOrder(positions.to(torch.int32), sorted_buckets.to(torch.int32), real_lengths)


def _hash(
    x: Tensor,
    rotations: Rotations,
    mask: Tensor | None,
    dtype: torch.dtype,
    row_tables: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Buckets (batch, heads, rounds, length) of a dtype; n_buckets where the mask (batch, length) is False."""
    if not available():
        raise ConfigError(
            "hashing in Triton needs a CUDA device: take megabase.models.attention.kernels.dispatch.rotate_and_hash"
        )
    from megabase.models.attention.kernels.triton.hashing import hash_positions

    return hash_positions(x, rotations, mask, dtype, row_tables)


def _with_dense_rows(x: Tensor) -> Tensor:
    """x, or a copy: elements of a row lie side by side, and `empty_like` gives a tensor of the same strides."""
    dense = x.stride(-1) == 1 and torch.empty_like(x, device="meta").stride() == x.stride()
    return x if dense else x.contiguous()
