"""Sorted attention and its hashing on a GPU, in Triton.

What is special:
- No sorted copies. A program takes a block of seats of one round, looks up which positions sit there, and gathers
  their rows of q, k, v by address. The rounds are launched one after the other. A position has one seat in a round,
  so a program is the only one that writes to its positions: it reads what the rounds before left there, goes on, and
  writes it back. No atomics, one order of summation: the same input gives the same bits.
- The merge of rounds is the online softmax itself: a round starts from the output and the log-sum-exp that the
  rounds before left, as if they were one more block of keys.
- Backward starts from the log-sum-exp over all rounds, and one launch for each round does both halves: a block's
  queries meet the keys before them (q's gradient), then its keys the queries behind them (those of k and v).
- No tables besides the SortedOrder: who meets whom follows from the buckets of two seats and their distance (rule
  `window`) or from the numbers of their chunks (`chunk`). Keys beyond the border of a bucket are not visited. Only
  `once` makes tables, of every position's seat and interval: whether a pair has met before is one comparison for each
  round before.
- Operands bf16, fp16 or fp32 (fp32 as three products of tf32), softmax and sums fp32. Tables of any integer dtype.
- Hashing is one kernel: projection and argmax of all rounds from one reading of x, as exact as in fp32. Buckets are
  sorted in the smallest integer type that holds them, stably: a radix sort passes once over keys of 8 bits.

docs/kernels.md has the reasons and the figures. Without a GPU the kernels run in Triton's interpreter
(TRITON_INTERPRET=1 before triton is imported): right, and slow.
"""

# What runs on the device has no types of Python; the functions of the host have all theirs.
# mypy: allow-untyped-defs

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megabase.models.attention.kernels.inputs import PairDropout, Rotations, Rule, SortedOrder, row_mask
from megabase.models.config import ConfigError
from megabase.models.gpu import DTYPES, FUSED, INTERPRETED, available, jit, padded, random_bits, tl, triton

WIDEST = 128
"""Largest width of q, k and v: beyond it the tiles of the backward pass do not fit into registers."""


def supports(q: Tensor, v: Tensor) -> bool:
    """Whether `sorted_attention` computes with such tensors: their device, dtypes and widths."""
    here = q.is_cuda or INTERPRETED
    return available() and here and all(x.dtype in DTYPES and x.shape[-1] <= WIDEST for x in (q, v))


def sorted_attention(
    q: Tensor, k: Tensor | None, v: Tensor, order: SortedOrder, rule: Rule, dropout: PairDropout | None = None
) -> Tensor:
    """See megabase.models.attention.kernels. Products in the inputs' dtype, softmax and sums in fp32.

    k = None: keys are the queries scaled to unit length (`dispatch.unit_keys`), without ever being written.
    q, k, v may have any strides of rows and positions; out and the gradients get those of v and of q, k, v. Raises
    ConfigError for tensors that `supports` refuses.
    """
    if not supports(q, v) or (k is not None and q.dtype != k.dtype):
        raise ConfigError(
            f"the Triton kernels take bf16, fp16 and fp32 of width {WIDEST} at the most, on a CUDA device, q and k of "
            f"one dtype; these are q {q.dtype}, k {q.dtype if k is None else k.dtype}, v {v.dtype}, widths "
            f"{q.shape[-1]} and {v.shape[-1]}, on {q.device}: take backend=chunked"
        )
    k = None if k is None else _rows_apart(k)
    return _SortedAttention.apply(_rows_apart(q), k, _rows_apart(v), order, rule, dropout)


def rotate_and_hash(x: Tensor, rotations: Rotations) -> Tensor:
    """Buckets of x (batch, heads, length, d): (batch, heads, rounds, length) int32, as megabase.models.attention.lsh's.

    rotations: on any device.
    """
    return _hash(x, rotations, None, torch.int32)


def sort_by_hash(x: Tensor, rotations: Rotations, mask: Tensor | None = None) -> SortedOrder:
    """Hash x (batch, heads, length, d) and sort: the seats of rows = batch × heads, tables of int32.

    rotations: see rotate_and_hash. mask: (batch, length) bool, True where a position is real; the others sit at
    the end, in the order of their positions, in a bucket of their own.
    """
    n_buckets = rotations.n_buckets
    small = next(t for t in (torch.uint8, torch.int16, torch.int32) if n_buckets <= torch.iinfo(t).max)
    sorted_buckets, positions = torch.sort(
        _hash(x, rotations, mask, small).flatten(0, 1), dim=-1, stable=True
    )
    real = SortedOrder.count_real(row_mask(mask, x.shape[1]), positions)
    return SortedOrder(positions.to(torch.int32), sorted_buckets.to(torch.int32), real)


class Tiles(NamedTuple):
    """How a kernel is cut. own: seats of a program; other: seats that it meets at a time; warps: of a program; stages:
    of the software pipeline; registers: of a thread at the most (None: as the compiler likes)."""

    own: int
    other: int
    warps: int
    stages: int
    registers: int | None = None


FORWARD = {
    16: Tiles(64, 32, 4, 1, 128),
    32: Tiles(64, 32, 4, 1, 128),
    64: Tiles(64, 32, 4, 1, 128),
    128: Tiles(64, 32, 4, 1, 168),
}
BACKWARD = {
    16: Tiles(64, 32, 4, 1, 168),
    32: Tiles(64, 32, 4, 1, 168),
    64: Tiles(64, 32, 4, 1, 168),
    128: Tiles(32, 32, 2, 2),
}
"""By the width of q, k and v, padded; operands of 16 bits.

Measured on an H100 (benchmarks/gpu_tiles.py, docs/kernels.md): the passes wait for rows that they gather, so what
counts is how many programs wait in turn. 32 seats at a time and limits on registers make room for them; a block meets
its own seats and `reach` more, so larger blocks meet more in vain.
"""

SINGLE = {16: Tiles(32, 32, 4, 1), 32: Tiles(32, 32, 4, 1), 64: Tiles(32, 32, 4, 1), 128: Tiles(32, 32, 8, 1)}
"""Operands of fp32, forward and backward."""

HASH = Tiles(128, 0, 4, 1)

PART = 1 << 28
"""Elements that one tensor of those a round leaves to the next holds at once (1 GiB); further rows wait."""


class _SortedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor | None,
        v: Tensor,
        order: SortedOrder,
        rule: Rule,
        dropout: PairDropout | None,
    ) -> Tensor:
        unit, k = k is None, q if k is None else k
        out = torch.empty_like(v)
        lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
        scales = torch.empty_like(lse) if unit else lse
        with torch.cuda.device_of(q):
            if unit:
                _unit_scales[(lse.shape[0] * triton.cdiv(lse.shape[1], 64),)](
                    *(q, scales, lse.shape[1], *_strides(q)),
                    **{"D": q.shape[-1], "PAD": padded(q.shape[-1]), "BLOCK": 64, **FUSED},
                )
            for part in _parts(q, v):
                launch = _Launch(q, v, order, rule, dropout, part, unit)
                tensors = [x[part] for x in (q, k, v, out)]
                launch.run(
                    _forward, FORWARD, [*tensors, launch.wide(v), lse[part], scales[part]], tensors[:3]
                )
        ctx.save_for_backward(q, k, v, out, lse, scales)
        ctx.case = order, rule, dropout, unit
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, scales = ctx.saved_tensors
        order, rule, dropout, unit = ctx.case
        grad = grads[0] if grads[0].stride(-1) == 1 else grads[0].contiguous()
        delta = torch.empty_like(lse)
        grad_q, grad_v = torch.empty_like(q), torch.empty_like(v)
        grad_k = grad_q if unit else torch.empty_like(k)
        with torch.cuda.device_of(q):
            _delta[(lse.shape[0] * triton.cdiv(lse.shape[1], 64),)](
                *(grad, out, delta, lse.shape[1], *_strides(grad), *_strides(out)),
                **{"D_V": v.shape[-1], "PAD_V": padded(v.shape[-1]), "BLOCK": 64, **FUSED},
            )
            for part in _parts(q, v):
                launch = _Launch(q, v, order, rule, dropout, part, unit)
                tensors = [x[part] for x in (q, k, v, grad)]
                vectors = [x[part] for x in (lse, delta, scales)]
                results = [x[part] for x in (grad_q, grad_k, grad_v)]
                wide_q, wide_v = launch.wide(q), launch.wide(v)
                wides = [wide_q, wide_q if unit else launch.wide(k), wide_v]
                launch.run(_backward, BACKWARD, [*tensors, *vectors, *results, *wides], tensors)
        return grad_q, None if unit else grad_k, grad_v, None, None, None


class _Launch:
    """What the launches for all rounds of some rows share."""

    def __init__(
        self,
        q: Tensor,
        v: Tensor,
        order: SortedOrder,
        rule: Rule,
        dropout: PairDropout | None,
        part: slice,
        unit: bool,
    ) -> None:
        tables = (order.positions[part], order.buckets[part])
        self.order, self.buckets = (x if x.stride(-1) == 1 else x.contiguous() for x in tables)
        self.rows, self.rounds, self.length = self.order.shape
        self.real, self.rule = order.real_lengths[part], rule
        self.keys, self.rate = (self.real, 0.0) if dropout is None else (dropout.keys[part], dropout.rate)
        self.dropout, self.unit = dropout is not None, unit
        self.d, self.d_v = q.shape[-1], v.shape[-1]
        self.single = torch.float32 in (q.dtype, v.dtype)
        self.reach = min(rule.reach, self.length)
        self.past = self.history() if rule.once else [self.order] * 3

    def run(self, kernel: Any, table: dict[int, Tiles], tensors: list[Tensor], apart: list[Tensor]) -> None:
        """Launch a kernel for every round, with tensors, and the strides of those whose rows may lie apart."""
        tiles = self.tiles(table)
        strides = [stride for x in apart for stride in _strides(x)]
        for number in range(self.rounds):
            kernel[(self.rows * triton.cdiv(self.length, tiles.own),)](
                *tensors, *self.tables(number), *strides, **self.settings(number, tiles)
            )

    def tiles(self, table: dict[int, Tiles]) -> Tiles:
        tiles = (SINGLE if self.single else table)[max(padded(self.d), padded(self.d_v))]
        plain = self.rule.attend == "window" and not self.rule.once and not self.dropout
        if table is BACKWARD and not plain:
            # What the other rules keep at hand besides would spill.
            tiles = tiles._replace(registers=None)
        return tiles

    def wide(self, x: Tensor) -> Tensor:
        """What a round leaves to the next of x: fp32 (rows, length, d); nothing if there is no next."""
        shape = (self.rows, *x.shape[1:]) if self.rounds > 1 else (0,)
        return torch.empty(shape, dtype=torch.float32, device=x.device)

    def history(self) -> list[Tensor]:
        """For `once`, by position, (rows, rounds, length) int32: the seat, and the interval of seats that is met, whose
        end is left out where the seat tells it."""
        window = self.rule.attend == "window"
        n_tables = (2 if self.rule.causal else 3) if window else 1
        tables = torch.empty(n_tables, *self.order.shape, dtype=torch.int32, device=self.order.device)
        rank, low, high = tables[0], tables[min(1, n_tables - 1)], tables[n_tables - 1]
        _history[(self.rows * self.rounds * triton.cdiv(self.length, 256),)](
            *(self.order, self.buckets, rank, low, high, self.real),
            *(*_strides(self.order), *_strides(self.buckets), self.length, self.reach, self.rounds),
            self.reach.bit_length(),
            **{"N_TABLES": n_tables, "BLOCK": 256, **FUSED},
        )
        return [rank, low, high]

    def tables(self, number: int) -> tuple[Any, ...]:
        """The arguments from `order` to `rounds`, the same for both kernels."""
        least = min(round(self.rate * 2.0**32) - (1 << 31), (1 << 31) - 1)
        return (
            *(self.order, self.buckets, *self.past, self.real, self.keys, least, 1.0 / (1.0 - self.rate)),
            *(*_strides(self.order), *_strides(self.buckets), self.length, self.reach, number, self.rounds),
        )

    def settings(self, number: int, tiles: Tiles) -> dict[str, Any]:
        """Everything that is compiled in. ROUND and ROUNDS only where the code depends on them."""
        rule = self.rule
        return {
            "ROUND": number if rule.once else 0,
            "ROUNDS": self.rounds if rule.once else 1,
            "FIRST": number == 0,
            "LAST": number == self.rounds - 1,
            "WINDOW": rule.attend == "window",
            "CAUSAL": rule.causal,
            "SHARED": rule.shared,
            "ONCE": rule.once,
            "DROPOUT": self.dropout,
            "UNIT": self.unit,
            "D": self.d,
            "PAD": padded(self.d),
            "D_V": self.d_v,
            "PAD_V": padded(self.d_v),
            "OWN": tiles.own,
            "OTHER": tiles.other,
            "num_warps": tiles.warps,
            "num_stages": tiles.stages,
            "maxnreg": tiles.registers,
            **FUSED,
        }


def _hash(x: Tensor, rotations: Rotations, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Buckets (batch, heads, rounds, length) of a dtype; n_buckets where the mask (batch, length) is False."""
    if not available():
        raise ConfigError(
            "hashing in Triton needs a CUDA device: take megabase.models.attention.lsh.rotate_and_hash"
        )
    x = x if x.stride(-1) == 1 else x.contiguous()
    batch, heads, length, d = x.shape
    first, second = rotations.halves if len(rotations.halves) == 2 else (*rotations.halves, 0)
    table = rotations.table.to(x.device).contiguous()
    buckets = torch.empty(batch, heads, rotations.rounds, length, dtype=dtype, device=x.device)
    with torch.cuda.device_of(x):
        _hash_kernel[(batch * heads * triton.cdiv(length, HASH.own),)](
            *(x, table, buckets if mask is None else mask.contiguous().view(torch.uint8), buckets),
            *(*x.stride()[:3], heads, length, rotations.rounds),
            **{"D": d, "PAD": padded(d), "FIRST": first, "FIRST_PAD": padded(first)},
            **{"SECOND": second, "SECOND_PAD": padded(second), "MASKED": mask is not None},
            OWN=HASH.own,
            num_warps=HASH.warps,
            num_stages=HASH.stages,
            **FUSED,
        )
    return buckets


def _rows_apart(x: Tensor) -> Tensor:
    """x, or a copy whose elements of a row lie side by side, and that `empty_like` copies in its strides."""
    side_by_side = x.stride(-1) == 1 and torch.empty_like(x, device="meta").stride() == x.stride()
    return x if side_by_side else x.contiguous()


def _parts(q: Tensor, v: Tensor) -> Iterator[slice]:
    """Rows that are computed together."""
    rows, length, d = q.shape
    step = max(1, PART // (length * max(d, v.shape[-1])))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _strides(x: Tensor) -> tuple[int, int]:
    return x.stride(0), x.stride(1)


_NUMBERS = (
    *("least", "order_row", "order_round", "buckets_row", "buckets_round"),
    *("length", "reach", "number", "rounds", "steps"),
)
"""Arguments whose values are compiled in nowhere: a new length or reach needs no new code."""


# From here on the code runs on the device. Seats, positions, buckets and chunks are int32; what is added to an address
# is 64 bits wide, for length · d · rows may pass 2^31. q_... belongs to queries, k_... to keys. A seat's `label` is its
# bucket (rule `window`) or its chunk; NOBODY's is none, and the two are no neighbours either.


_WIDEN = triton and tl.constexpr(INTERPRETED)
"""The interpreter multiplies matrices of bf16 as if they were integers; in fp32 their products are the same."""


@jit()
def _product(a, b, acc=None):
    """a @ b + acc in fp32; operands of fp32 in three products of tf32, which keep 22 bits of each."""
    if _WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="tf32x3")


@jit()
def _dropped(q_pos, k_pos, key, least, kept):
    """PairDropout.scale: `kept` or 0 for pairs of positions, of shapes that broadcast."""
    low, high = key.to(tl.uint32), (key >> 32).to(tl.uint32)
    bits = random_bits(q_pos.to(tl.uint32), low, high)
    bits = random_bits(bits ^ k_pos.to(tl.uint32), low, high)
    return tl.where(bits.to(tl.int32, bitcast=True) >= least, kept, 0.0)


@jit()
def _load_rows(x, row, stride, there, WIDTH: tl.constexpr, PAD: tl.constexpr):
    """Rows of x by number: (rows, PAD), 0 where they are not there and beyond WIDTH."""
    column = tl.arange(0, PAD)
    mask = there[:, None]
    if WIDTH != PAD:
        mask = mask & (column < WIDTH)[None, :]
    return tl.load(x + row.to(tl.int64)[:, None] * stride + column[None, :], mask=mask, other=0.0)


@jit()
def _store_rows(x, row, stride, there, y, WIDTH: tl.constexpr, PAD: tl.constexpr):
    """The inverse of _load_rows: y where it is there."""
    column = tl.arange(0, PAD)
    mask = there[:, None]
    if WIDTH != PAD:
        mask = mask & (column < WIDTH)[None, :]
    tl.store(x + row.to(tl.int64)[:, None] * stride + column[None, :], y.to(x.dtype.element_ty), mask=mask)


@jit()
def _load_numbers(table, index, there):
    """Entries of a table of integers as int32; 0 where they are not there."""
    return tl.load(table + index, mask=there, other=0).to(tl.int32)


@jit()
def _again(table, index, there):
    """_load_numbers anew: what was made of the numbers before, such as addresses, need not stay in registers."""
    return tl.load(table + index, mask=there, other=0, volatile=True).to(tl.int32)


@jit()
def _label(buckets, seat, there, reach, nobody, WINDOW: tl.constexpr):
    label = _load_numbers(buckets, seat, there) if WINDOW else seat // reach
    return tl.where(there, label, nobody)


@jit()
def _neighbours(buckets, bucket, seat, reach, count, BEHIND: tl.constexpr, STEP: tl.constexpr):
    """How many of the `reach` seats before `seat` (BEHIND: from it on) belong to `bucket`: one number."""
    found = tl.zeros((STEP,), dtype=tl.int32)
    for begin in range(0, reach, STEP):
        offset = begin + tl.arange(0, STEP)
        place = seat + offset if BEHIND else seat - 1 - offset
        there = (offset < reach) & (place >= 0) & (place < count)
        found += (there & (_load_numbers(buckets, place, there) == bucket)).to(tl.int32)
    return tl.sum(found, axis=0)


@jit()
def _span(
    buckets,
    start,
    stop,
    reach,
    count,
    WINDOW: tl.constexpr,
    BEFORE: tl.constexpr,
    BEHIND: tl.constexpr,
    STEP: tl.constexpr,
):
    """The seats [first, last) that the seats [start, stop) meet on the sides named, themselves included."""
    final = tl.maximum(stop - 1, 0)
    if WINDOW:
        first, last = start, stop
        if BEFORE:
            bucket = tl.load(buckets + tl.minimum(start, final)).to(tl.int32)
            first -= _neighbours(buckets, bucket, start, reach, count, False, STEP)
        if BEHIND:
            bucket = tl.load(buckets + final).to(tl.int32)
            last += _neighbours(buckets, bucket, stop, reach, count, True, STEP)
    else:
        first, last = start // reach * reach, (final // reach + 1) * reach
        if BEFORE:
            first = tl.maximum(first - reach, 0)
        if BEHIND:
            last += reach
        last = tl.minimum(last, count)
    # Nobody real sits here: nobody is met.
    return first, tl.where(start < stop, last, first)


@jit()
def _meets(
    q_seat,
    q_label,
    q_pos,
    k_seat,
    k_label,
    k_pos,
    reach,
    WINDOW: tl.constexpr,
    CAUSAL: tl.constexpr,
    SHARED: tl.constexpr,
):
    """Rule: whether query meets key, in one round."""
    if WINDOW:
        ahead = q_seat - k_seat
        if CAUSAL:
            met = (q_label == k_label) & (ahead.to(tl.uint32, bitcast=True) <= reach)
        else:
            met = (q_label == k_label) & ((ahead + reach).to(tl.uint32, bitcast=True) <= 2 * reach)
        if SHARED:
            met = met & (ahead != 0)
    else:
        # The own chunk or the one before: a difference of 0 or 1, read without sign.
        met = (q_label - k_label).to(tl.uint32, bitcast=True) <= 1
        if CAUSAL:
            met = met & (k_pos <= q_pos)
        if SHARED:
            met = met & (k_pos != q_pos)
    return met


@jit()
def _met_before(
    q_pos,
    k_pos,
    rank,
    low,
    high,
    length,
    reach,
    count,
    WINDOW: tl.constexpr,
    CAUSAL: tl.constexpr,
    RING: tl.constexpr,
    ROUND: tl.constexpr,
    ROUNDS: tl.constexpr,
):
    """Whether the pair met in an earlier round than ROUND (RING: or in the chunks of this one)."""
    met = (q_pos < 0) & (k_pos < 0)
    for other in tl.static_range(ROUND + RING):
        k_seat = tl.load(rank + other * length + k_pos)
        if WINDOW:
            q_low = tl.load(low + other * length + q_pos)
            # Causal: up to the own seat.
            q_high = tl.load((rank if CAUSAL else high) + other * length + q_pos) + CAUSAL
            met = met | (
                (k_seat - q_low).to(tl.uint32, bitcast=True) < (q_high - q_low).to(tl.uint32, bitcast=True)
            )
        else:
            q_seat = tl.load(rank + other * length + q_pos)
            met = met | ((q_seat // reach - k_seat // reach).to(tl.uint32, bitcast=True) <= 1)
            if other < ROUND:
                k_seat = tl.load(rank + ((other + ROUNDS - 1) % ROUNDS) * length + k_pos)
                met = met | ((q_seat < reach) & (k_seat // reach == (count - 1) // reach))
    return met


@jit()
def _met(
    q_seat,
    q_label,
    q_pos,
    k_seat,
    k_label,
    k_pos,
    rank,
    low,
    high,
    length,
    reach,
    count,
    WINDOW: tl.constexpr,
    CAUSAL: tl.constexpr,
    SHARED: tl.constexpr,
    ONCE: tl.constexpr,
    RING: tl.constexpr,
    ROUND: tl.constexpr,
    ROUNDS: tl.constexpr,
):
    """Whether the pair counts here."""
    met = _meets(q_seat, q_label, q_pos, k_seat, k_label, k_pos, reach, WINDOW and not RING, CAUSAL, SHARED)
    if ONCE and ROUND + RING > 0:
        met = met & ~_met_before(
            q_pos, k_pos, rank, low, high, length, reach, count, WINDOW, CAUSAL, RING, ROUND, ROUNDS
        )
    return met


@jit()
def _begin(
    wide,
    pos,
    there,
    length,
    row,
    FIRST: tl.constexpr,
    OWN: tl.constexpr,
    WIDTH: tl.constexpr,
    PAD: tl.constexpr,
):
    """What the rounds before left at positions: fp32 (OWN, PAD)."""
    if FIRST:
        return tl.zeros((OWN, PAD), dtype=tl.float32)
    return _load_rows(wide + row * length * WIDTH, pos, WIDTH, there, WIDTH, PAD)


@jit()
def _finish(
    wide,
    x,
    x_row,
    x_step,
    pos,
    inside,
    length,
    row,
    y,
    LAST: tl.constexpr,
    WIDTH: tl.constexpr,
    PAD: tl.constexpr,
):
    """Leave y (OWN, PAD) to the next round; the last one writes x."""
    if LAST:
        _store_rows(x + row * x_row, pos, x_step, inside, y, WIDTH, PAD)
    else:
        _store_rows(wide + row * length * WIDTH, pos, WIDTH, inside, y, WIDTH, PAD)


@jit()
def _last_chunk(start, reach, count):
    """The seats [first, last) of the last chunk, for the programs that own seats of the first chunk."""
    first = tl.maximum(count - 1, 0) // reach * reach
    return first, tl.where(start < reach, count, first)


@jit(do_not_specialize=_NUMBERS)
def _forward(
    q,
    k,
    v,
    out,
    wide,
    lse,
    scales,
    order,
    buckets,
    rank,
    low,
    high,
    real,
    keys,
    least,
    kept,
    order_row,
    order_round,
    buckets_row,
    buckets_round,
    length,
    reach,
    number,
    rounds,
    q_row,
    q_step,
    k_row,
    k_step,
    v_row,
    v_step,
    ROUND: tl.constexpr,
    ROUNDS: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    WINDOW: tl.constexpr,
    CAUSAL: tl.constexpr,
    SHARED: tl.constexpr,
    ONCE: tl.constexpr,
    DROPOUT: tl.constexpr,
    UNIT: tl.constexpr,
    D: tl.constexpr,
    PAD: tl.constexpr,
    D_V: tl.constexpr,
    PAD_V: tl.constexpr,
    OWN: tl.constexpr,
    OTHER: tl.constexpr,
):
    """Round `number` of the forward pass for OWN seats: out (or wide) and lse, in powers of 2, at their positions."""
    blocks = tl.cdiv(length, OWN)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    start = tl.program_id(0) % blocks * OWN
    order, buckets, past = order + row * order_row, buckets + row * buckets_row, row * rounds * length
    rank, low, high = rank + past, low + past, high + past
    here = buckets + number.to(tl.int64) * buckets_round
    count = tl.load(real + row).to(tl.int32)
    stop = tl.minimum(start + OWN, count)
    if DROPOUT:
        drop = tl.load(keys + row)

    q_seat = start + tl.arange(0, OWN)
    inside, there = q_seat < length, q_seat < count
    q_pos = _load_numbers(order + number.to(tl.int64) * order_round, q_seat, inside)
    query = _load_rows(q + row * q_row, q_pos, q_step, there, D, PAD)
    acc = _begin(wide, q_pos, there, length, row, FIRST, OWN, D_V, PAD_V)
    if FIRST:
        peak = tl.full((OWN,), -1e30, dtype=tl.float32)
    else:
        peak = tl.load(lse + row * length + q_pos, mask=there, other=-1e30)
    total = tl.where(peak > -1e29, 1.0, 0.0)

    for RING in tl.static_range(1 if WINDOW else 2):
        if RING:
            # The first chunk follows the last one of the round before.
            first, last = _last_chunk(start, reach, count)
            q_label = tl.where(there & (q_seat < reach), 1, -2147483648)
            key_order = order + ((number + rounds - 1) % rounds).to(tl.int64) * order_round
        else:
            first, last = _span(here, start, stop, reach, count, WINDOW, True, WINDOW and not CAUSAL, OTHER)
            q_label = _label(here, q_seat, there, reach, -2147483648, WINDOW)
            key_order = order + number.to(tl.int64) * order_round
        for begin in range(first, last, OTHER):
            k_seat = begin + tl.arange(0, OTHER)
            k_there = k_seat < last
            k_pos = _load_numbers(key_order, k_seat, k_there)
            if RING:
                k_label = tl.where(k_there, 0, -2147483640)
            else:
                k_label = _label(here, k_seat, k_there, reach, -2147483640, WINDOW)
            key = _load_rows(k + row * k_row, k_pos, k_step, k_there, D, PAD)
            value = _load_rows(v + row * v_row, k_pos, v_step, k_there, D_V, PAD_V)
            scores = _product(query, tl.trans(key)) * 1.4426950408889634
            if UNIT:
                scores *= tl.load(scales + row * length + k_pos, mask=k_there, other=0.0)[None, :]
            met = _met(
                *(q_seat[:, None], q_label[:, None], q_pos[:, None]),
                *(k_seat[None, :], k_label[None, :], k_pos[None, :]),
                *(rank, low, high, length, reach, count),
                *(WINDOW, CAUSAL, SHARED, ONCE, RING, ROUND, ROUNDS),
            )
            scores = tl.where(met, scores, float("-inf"))
            higher = tl.maximum(peak, tl.max(scores, axis=1))
            fade = tl.exp2(peak - higher)
            weights = tl.exp2(scores - higher[:, None])
            total = total * fade + tl.sum(weights, axis=1)
            if DROPOUT:
                weights = weights * _dropped(q_pos[:, None], k_pos[None, :], drop, least, kept)
            acc = _product(weights.to(value.dtype), value, acc * fade[:, None])
            peak = higher

    lonely = total == 0.0
    total = tl.where(lonely, 1.0, total)
    acc = acc / total[:, None]
    if LAST:
        alone = _load_rows(v + row * v_row, q_pos, v_step, there & lonely, D_V, PAD_V).to(tl.float32)
        if DROPOUT:
            alone = alone * _dropped(q_pos, q_pos, drop, least, kept)[:, None]
        acc = tl.where(lonely[:, None], alone, acc)
    _finish(wide, out, v_row, v_step, q_pos, inside, length, row, acc, LAST, D_V, PAD_V)
    tl.store(lse + row * length + q_pos, tl.where(lonely, -1e30, peak + tl.log2(total)), mask=inside)


@jit(do_not_specialize=_NUMBERS)
def _backward(
    q,
    k,
    v,
    grad,
    lse,
    delta,
    scales,
    grad_q,
    grad_k,
    grad_v,
    wide_q,
    wide_k,
    wide_v,
    order,
    buckets,
    rank,
    low,
    high,
    real,
    keys,
    least,
    kept,
    order_row,
    order_round,
    buckets_row,
    buckets_round,
    length,
    reach,
    number,
    rounds,
    q_row,
    q_step,
    k_row,
    k_step,
    v_row,
    v_step,
    g_row,
    g_step,
    ROUND: tl.constexpr,
    ROUNDS: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    WINDOW: tl.constexpr,
    CAUSAL: tl.constexpr,
    SHARED: tl.constexpr,
    ONCE: tl.constexpr,
    DROPOUT: tl.constexpr,
    UNIT: tl.constexpr,
    D: tl.constexpr,
    PAD: tl.constexpr,
    D_V: tl.constexpr,
    PAD_V: tl.constexpr,
    OWN: tl.constexpr,
    OTHER: tl.constexpr,
):
    """Round `number` of the backward pass for OWN seats: q's gradient as queries, k's and v's as keys."""
    blocks = tl.cdiv(length, OWN)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    start = tl.program_id(0) % blocks * OWN
    order, buckets, past = order + row * order_row, buckets + row * buckets_row, row * rounds * length
    rank, low, high = rank + past, low + past, high + past
    here = buckets + number.to(tl.int64) * buckets_round
    own_order = order + number.to(tl.int64) * order_round
    q, k, v, grad = q + row * q_row, k + row * k_row, v + row * v_row, grad + row * g_row
    lse, delta, scales = lse + row * length, delta + row * length, scales + row * length
    count = tl.load(real + row).to(tl.int32)
    stop = tl.minimum(start + OWN, count)
    if DROPOUT:
        drop = tl.load(keys + row)

    seat = start + tl.arange(0, OWN)
    inside, there = seat < length, seat < count
    pos = _load_numbers(own_order, seat, inside)

    # As keys: the queries behind them.
    own_key = _load_rows(k, pos, k_step, there, D, PAD)
    if UNIT:
        own_scale = tl.load(scales + pos, mask=there, other=0.0)
    own_value = _load_rows(v, pos, v_step, there, D_V, PAD_V)
    # In UNIT a key's gradient goes into its query's.
    acc_k = _begin(wide_k, pos, there, length, row, FIRST or UNIT, OWN, D, PAD)
    acc_v = _begin(wide_v, pos, there, length, row, FIRST, OWN, D_V, PAD_V)
    if FIRST:
        # Who met nothing in any round took its own value.
        lonely = there & (tl.load(lse + pos, mask=there, other=0.0) < -1e29)
        alone = _load_rows(grad, pos, g_step, lonely, D_V, PAD_V).to(tl.float32)
        if DROPOUT:
            alone = alone * _dropped(pos, pos, drop, least, kept)[:, None]
        acc_v += alone
    for RING in tl.static_range(1 if WINDOW else 2):
        if RING:
            # The last chunk is met by the first one of the round after.
            chunk = tl.maximum(count - 1, 0) // reach
            first = 0
            last = tl.where(stop > chunk * reach, tl.minimum(reach, count), 0)
            own_label = tl.where(there & (seat >= chunk * reach), 0, -2147483640)
            query_order = order + ((number + 1) % rounds).to(tl.int64) * order_round
        else:
            first, last = _span(here, start, stop, reach, count, WINDOW, WINDOW and not CAUSAL, True, OTHER)
            own_label = _label(here, seat, there, reach, -2147483640, WINDOW)
            query_order = own_order
        for begin in range(first, last, OTHER):
            q_seat = begin + tl.arange(0, OTHER)
            q_there = q_seat < last
            q_pos = _load_numbers(query_order, q_seat, q_there)
            if RING:
                q_label = tl.where(q_there, 1, -2147483648)
            else:
                q_label = _label(here, q_seat, q_there, reach, -2147483648, WINDOW)
            query = _load_rows(q, q_pos, q_step, q_there, D, PAD)
            pull = _load_rows(grad, q_pos, g_step, q_there, D_V, PAD_V)
            q_lse = tl.load(lse + q_pos, mask=q_there, other=0.0)
            q_delta = tl.load(delta + q_pos, mask=q_there, other=0.0)
            scores = _product(own_key, tl.trans(query)) * 1.4426950408889634
            if UNIT:
                scores *= own_scale[:, None]
            change = _product(own_value, tl.trans(pull))
            met = _met(
                *(q_seat[None, :], q_label[None, :], q_pos[None, :]),
                *(seat[:, None], own_label[:, None], pos[:, None]),
                *(rank, low, high, length, reach, count),
                *(WINDOW, CAUSAL, SHARED, ONCE, RING, (ROUND + 1) % ROUNDS if RING else ROUND, ROUNDS),
            )
            weights = tl.exp2(tl.where(met, scores - q_lse[None, :], float("-inf")))
            kept_weights = weights
            if DROPOUT:
                kept_or_not = _dropped(q_pos[None, :], pos[:, None], drop, least, kept)
                kept_weights = weights * kept_or_not
                change = change * kept_or_not
            acc_v = _product(kept_weights.to(pull.dtype), pull, acc_v)
            change = weights * (change - q_delta[None, :])
            acc_k = _product(change.to(query.dtype), query, acc_k)
    own_pos = _again(own_order, seat, inside)
    _finish(wide_v, grad_v, v_row, v_step, own_pos, inside, length, row, acc_v, LAST, D_V, PAD_V)
    if UNIT:
        # k = c · x, 1 / c² = Σ x² + const: x's gradient is c · dk − c³ · (x · dk) · x.
        x = own_key.to(tl.float32)
        along = own_scale * own_scale * tl.sum(acc_k * x, axis=1)
        acc = own_scale[:, None] * (acc_k - along[:, None] * x)
        acc += _begin(wide_q, own_pos, there, length, row, FIRST, OWN, D, PAD)
    else:
        _finish(wide_k, grad_k, k_row, k_step, own_pos, inside, length, row, acc_k, LAST, D, PAD)
        acc = _begin(wide_q, own_pos, there, length, row, FIRST, OWN, D, PAD)

    # As queries: the keys before them.
    own_query = _load_rows(q, own_pos, q_step, there, D, PAD)
    own_pull = _load_rows(grad, own_pos, g_step, there, D_V, PAD_V)
    own_lse = tl.load(lse + own_pos, mask=there, other=0.0)
    own_delta = tl.load(delta + own_pos, mask=there, other=0.0)
    for RING in tl.static_range(1 if WINDOW else 2):
        if RING:
            first, last = _last_chunk(start, reach, count)
            own_label = tl.where(there & (seat < reach), 1, -2147483648)
            key_order = order + ((number + rounds - 1) % rounds).to(tl.int64) * order_round
        else:
            first, last = _span(here, start, stop, reach, count, WINDOW, True, WINDOW and not CAUSAL, OTHER)
            own_label = _label(here, seat, there, reach, -2147483648, WINDOW)
            key_order = own_order
        for begin in range(first, last, OTHER):
            k_seat = begin + tl.arange(0, OTHER)
            k_there = k_seat < last
            k_pos = _load_numbers(key_order, k_seat, k_there)
            if RING:
                k_label = tl.where(k_there, 0, -2147483640)
            else:
                k_label = _label(here, k_seat, k_there, reach, -2147483640, WINDOW)
            key = _load_rows(k, k_pos, k_step, k_there, D, PAD)
            value = _load_rows(v, k_pos, v_step, k_there, D_V, PAD_V)
            scores = _product(own_query, tl.trans(key)) * 1.4426950408889634
            if UNIT:
                scale = tl.load(scales + k_pos, mask=k_there, other=0.0)
                scores *= scale[None, :]
            change = _product(own_pull, tl.trans(value))
            met = _met(
                *(seat[:, None], own_label[:, None], own_pos[:, None]),
                *(k_seat[None, :], k_label[None, :], k_pos[None, :]),
                *(rank, low, high, length, reach, count),
                *(WINDOW, CAUSAL, SHARED, ONCE, RING, ROUND, ROUNDS),
            )
            weights = tl.exp2(tl.where(met, scores - own_lse[:, None], float("-inf")))
            if DROPOUT:
                change = change * _dropped(own_pos[:, None], k_pos[None, :], drop, least, kept)
            change = weights * (change - own_delta[:, None])
            if UNIT:
                change *= scale[None, :]
            acc = _product(change.to(key.dtype), key, acc)
    own_pos = _again(own_order, seat, inside)
    _finish(wide_q, grad_q, q_row, q_step, own_pos, inside, length, row, acc, LAST, D, PAD)


@jit(do_not_specialize=_NUMBERS)
def _history(
    order,
    buckets,
    rank,
    low,
    high,
    real,
    order_row,
    order_round,
    buckets_row,
    buckets_round,
    length,
    reach,
    rounds,
    steps,
    N_TABLES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """For BLOCK seats of a round, at their positions: rank the seat; low, high the first seat of the bucket among the
    `reach` before, and behind the last one among the `reach` that follow. By bisection: 2^steps > reach."""
    blocks = tl.cdiv(length, BLOCK)
    line = (tl.program_id(0) // blocks).to(tl.int64)
    row, number = line // rounds, line % rounds
    seat = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    there = seat < length
    pos = _load_numbers(order + row * order_row + number * order_round, seat, there) + line * length
    tl.store(rank + pos, seat, mask=there)
    if N_TABLES > 1:
        buckets += row * buckets_row + number * buckets_round
        bucket = _load_numbers(buckets, seat, there)
        least, most = tl.maximum(seat - reach, 0), seat
        for _ in range(steps):
            middle = (least + most) // 2
            same = _load_numbers(buckets, middle, there) == bucket
            least, most = tl.where(same, least, middle + 1), tl.where(same, middle, most)
        tl.store(low + pos, most, mask=there)
    if N_TABLES > 2:
        final = tl.load(real + row).to(tl.int32) - 1
        least, most = seat, tl.maximum(tl.minimum(seat + reach, final), seat)
        for _ in range(steps):
            middle = (least + most + 1) // 2
            same = _load_numbers(buckets, middle, there) == bucket
            least, most = tl.where(same, middle, least), tl.where(same, most, middle - 1)
        tl.store(high + pos, least + 1, mask=there)


@jit()
def _unit_scales(q, scales, length, q_row, q_step, D: tl.constexpr, PAD: tl.constexpr, BLOCK: tl.constexpr):
    """What makes unit keys of BLOCK queries: 1 / √(Σ q² + 1e-6 · D), as models.attention.kernels.dispatch.unit_keys."""
    blocks = tl.cdiv(length, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    pos = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    there = pos < length
    x = _load_rows(q + row * q_row, pos, q_step, there, D, PAD).to(tl.float32)
    tl.store(scales + row * length + pos, tl.rsqrt(tl.sum(x * x, axis=1) + 1e-6 * D), mask=there)


@jit()
def _delta(
    grad,
    out,
    delta,
    length,
    g_row,
    g_step,
    out_row,
    out_step,
    D_V: tl.constexpr,
    PAD_V: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """delta = Σ grad · out, for BLOCK positions: what every score of a query is pulled by."""
    blocks = tl.cdiv(length, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    pos = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    there = pos < length
    x = _load_rows(grad + row * g_row, pos, g_step, there, D_V, PAD_V).to(tl.float32)
    y = _load_rows(out + row * out_row, pos, out_step, there, D_V, PAD_V).to(tl.float32)
    tl.store(delta + row * length + pos, tl.sum(x * y, axis=1), mask=there)


@jit()
def _sector(x, table, width, D: tl.constexpr, PAD: tl.constexpr, HALF: tl.constexpr, HALF_PAD: tl.constexpr):
    """argmax([xR, −xR]) for x (OWN, PAD) and R (D, HALF), whose rows lie `width` apart; the first on ties."""
    line, column = tl.arange(0, PAD), tl.arange(0, HALF_PAD)
    exists = column < HALF
    rotation = tl.load(
        table + line[:, None] * width + column[None, :], mask=(line < D)[:, None] & exists[None, :], other=0.0
    )
    # Drawn rotations are of bf16: with x of 16 bits, every single product is exact.
    if x.dtype != rotation.dtype:
        x, rotation = x.to(tl.float32), rotation.to(tl.float32)
    rotated = _product(x, rotation)
    most, place = tl.max(tl.where(exists[None, :], rotated, float("-inf")), axis=1, return_indices=True)
    least, opposite = tl.min(tl.where(exists[None, :], rotated, float("inf")), axis=1, return_indices=True)
    # What is not a number may win anywhere: no bucket beyond the last.
    return tl.minimum(tl.where(most >= -least, place, opposite + HALF), 2 * HALF - 1)


@jit(do_not_specialize=["length", "heads", "rounds"])
def _hash_kernel(
    x,
    table,
    mask,
    buckets,
    x_batch,
    x_head,
    x_step,
    heads,
    length,
    rounds,
    D: tl.constexpr,
    PAD: tl.constexpr,
    FIRST: tl.constexpr,
    FIRST_PAD: tl.constexpr,
    SECOND: tl.constexpr,
    SECOND_PAD: tl.constexpr,
    MASKED: tl.constexpr,
    OWN: tl.constexpr,
):
    """Buckets (batch, heads, rounds, length) of OWN positions of one head, all rounds."""
    blocks = tl.cdiv(length, OWN)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    pos = tl.program_id(0) % blocks * OWN + tl.arange(0, OWN)
    there = pos < length
    batch, head = row // heads, row % heads
    rows = _load_rows(x + batch * x_batch + head * x_head, pos, x_step, there, D, PAD)
    for number in range(rounds):
        drawn = table + (number * heads + head) * D * (FIRST + SECOND)
        bucket = _sector(rows, drawn, FIRST + SECOND, D, PAD, FIRST, FIRST_PAD)
        if SECOND:
            other = _sector(rows, drawn + FIRST, FIRST + SECOND, D, PAD, SECOND, SECOND_PAD)
            bucket += 2 * FIRST * other
        if MASKED:
            is_real = tl.load(mask + batch * length + pos, mask=there, other=0) != 0
            bucket = tl.where(is_real, bucket, 2 * FIRST * (2 * SECOND if SECOND else 1))
        place = buckets + (row * rounds + number) * length + pos
        tl.store(place, bucket.to(buckets.dtype.element_ty), mask=there)
