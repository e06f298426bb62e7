"""One sequence over several processes (sequence parallelism): each holds a part of every sequence.

    part = Part(rank, size, length, Group(process_group))
    loss = model.loss(tokens[:, part.rows], labels[:, part.rows], seeds=seeds, part=part)   # of this part
    loss.backward()                                                                # summed over ranks: the gradients

All parts are equally long and in the order of the ranks. Most of a model treats each position on its own and needs
nothing of this module. The others exchange:

- Attention exchanges positions for heads (`to_heads`), as in DeepSpeed-Ulysses (Jacobs et al. 2023): between two
  all-to-all exchanges a process has all positions of some heads, so hashing and sorting see the whole sequence, and
  kernels need not know. The number of heads must be a multiple of the number of processes.
- Local attention, the short convolution and values that look ahead need their neighbours only (`with_neighbours`).

Every exchange is an autograd function whose backward pass is the transposed exchange. So a parameter's gradients,
summed over the processes, are its gradient for the whole sequence. DDP and ZeRO sum them as they do for different
sequences; they are not told of parts. (torch.distributed.nn has such functions, but they are deprecated, and what they
point to is private.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor


class Exchange(Protocol):
    """What the processes that hold one sequence do together. Each of them must call it, in the same order."""

    def __call__(self, sent: Tensor, counts_sent: Sequence[int], counts: Sequence[int]) -> Tensor:
        """Send rows to every process, and receive rows from every process.

        Args:
            sent: (rows, ...), for process 0, process 1, ...
            counts_sent: how many of them are for each process.
            counts: how many rows come from each process.

        Returns:
            (Σ counts, ...), from process 0, process 1, ...
        """
        ...


@dataclass(frozen=True)
class Group:
    """The exchange between the processes of a torch.distributed group."""

    group: dist.ProcessGroup

    def __call__(self, sent: Tensor, counts_sent: Sequence[int], counts: Sequence[int]) -> Tensor:
        received = sent.new_empty(sum(counts), *sent.shape[1:])
        dist.all_to_all_single(received, sent.contiguous(), list(counts), list(counts_sent), group=self.group)
        return received


@dataclass(frozen=True)
class Loopback:
    """An exchange of one process with itself, to measure the time and memory of one of several processes.

    Numbers are wrong: what the others would send are copies of this process's own rows.
    """

    def __call__(self, sent: Tensor, counts_sent: Sequence[int], counts: Sequence[int]) -> Tensor:
        rows = sum(counts)
        if not rows or not sent.shape[0]:
            return sent.new_zeros(rows, *sent.shape[1:])
        return sent.repeat(-(-rows // sent.shape[0]), *(1 for _ in sent.shape[1:]))[:rows].contiguous()


@dataclass(frozen=True)
class Around:
    """Which positions around a part a computation needs. Those outside the sequence do not exist.

    Attributes:
        before: positions before the part.
        after: positions after it.
        piece: the first position is rounded down, and the end up, to a multiple of this.
    """

    before: int
    after: int
    piece: int = 1

    def of(self, part: Part, rank: int | None = None) -> tuple[int, int]:
        """The positions [start, end) that the process `rank` needs; None: this one."""
        n, rank = part.length // part.size, part.rank if rank is None else rank
        start = (rank * n - self.before) // self.piece * self.piece
        end = -(-((rank + 1) * n + self.after) // self.piece) * self.piece
        return max(0, start), min(part.length, end)

    def first(self, part: Part) -> int:
        """How many of the positions are before this process's own."""
        return part.start - self.of(part)[0]


@dataclass(frozen=True)
class Part:
    """The part of every sequence that this process holds.

    Attributes:
        rank: number of the part, from 0.
        size: number of parts.
        length: of the whole sequence, a multiple of `size`.
        exchange: with the processes that hold the other parts.
    """

    rank: int
    size: int
    length: int
    exchange: Exchange

    def __post_init__(self) -> None:
        if self.length % self.size:
            raise ValueError(
                f"a sequence of {self.length:,} positions cannot be cut into {self.size} equal parts: pad it to a "
                f"multiple of {self.size}"
            )

    @property
    def rows(self) -> slice:
        """The positions of this part."""
        return slice(self.start, self.start + self.length // self.size)

    @property
    def start(self) -> int:
        """The first position of this part."""
        return self.rank * (self.length // self.size)

    def heads(self, heads: int) -> slice:
        """The heads that this process has between `to_heads` and `to_positions`. Raises ValueError if they differ."""
        if heads % self.size:
            raise ValueError(
                f"{heads} heads cannot be shared by {self.size} processes: take a number of processes that divides "
                "the number of heads"
            )
        share = heads // self.size
        return slice(self.rank * share, (self.rank + 1) * share)

    def to_heads(self, x: Tensor) -> Tensor:
        """All positions of this process's heads.

        (batch, heads, length / size, d) -> (batch, heads / size, length, d).
        """
        self.heads(x.shape[1])
        result: Tensor = _Exchanged.apply(x, self, _to_heads, _to_positions)
        return result

    def to_positions(self, x: Tensor) -> Tensor:
        """The inverse of `to_heads`: (batch, heads / size, length, d) -> (batch, heads, length / size, d)."""
        result: Tensor = _Exchanged.apply(x, self, _to_positions, _to_heads)
        return result

    def with_neighbours(self, x: Tensor, around: Around, dim: int = 1) -> Tensor:
        """x with positions around this part, which may be those of several other parts.

        Args:
            x: (..., length / size, ...).
            around: which positions.
            dim: the dimension of the positions.

        Returns:
            (..., n, ...): the positions `around.of(self)`, of which this part's begin at `around.first(self)`.
        """
        # Not every backend sends bool.
        sent = x.to(torch.uint8) if x.dtype == torch.bool else x
        result: Tensor = _WithNeighbours.apply(sent, self, around, dim)
        return result.to(x.dtype)

    def gather(self, x: Tensor) -> Tensor:
        """What all processes hold, without a gradient: (batch, length / size) -> (batch, length)."""
        with torch.no_grad():
            return self.with_neighbours(x, Around(self.length, self.length))


_Exchanges = Callable[[Tensor, Part], Tensor]


def _to_heads(x: Tensor, part: Part) -> Tensor:
    batch, heads, n, d = x.shape
    share = heads // part.size
    rows = x.unflatten(1, (part.size, share)).transpose(0, 1).flatten(0, 1)  # (size · batch, share, n, d)
    counts = [batch] * part.size
    received = part.exchange(rows, counts, counts).unflatten(0, (part.size, batch))
    return received.permute(1, 2, 0, 3, 4).reshape(batch, share, part.size * n, d)


def _to_positions(x: Tensor, part: Part) -> Tensor:
    batch, _, length, _ = x.shape
    rows = x.unflatten(2, (part.size, length // part.size)).permute(2, 0, 1, 3, 4).flatten(0, 1)
    counts = [batch] * part.size
    received = part.exchange(rows, counts, counts).unflatten(0, (part.size, batch))
    return received.transpose(0, 1).flatten(1, 2)


class _Exchanged(torch.autograd.Function):
    """An exchange, whose backward pass is the exchange `back`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, part: Part, there: _Exchanges, back: _Exchanges) -> Tensor:
        ctx.part, ctx.back = part, back
        return there(x, part)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.back(grads[0], ctx.part), None, None, None


@dataclass(frozen=True)
class _Plan:
    """Which rows this process sends to and receives from each of the others, to get its neighbours' positions.

    Attributes:
        sent: for each process, the rows [start, end) of this part that it needs.
        received: how many rows come from each process: first those before this part, then those after it.
    """

    sent: list[tuple[int, int]]
    received: list[int]

    @classmethod
    def of(cls, part: Part, around: Around) -> _Plan:
        n = part.length // part.size
        sent, received = [], []
        for other in range(part.size):
            if other == part.rank:
                sent.append((0, 0))
                received.append(0)
                continue
            start, end = around.of(part, other)
            low, high = max(start, part.start), min(end, part.start + n)
            sent.append((low - part.start, max(low, high) - part.start))
            start, end = around.of(part)
            low, high = max(start, other * n), min(end, (other + 1) * n)
            received.append(max(0, high - low))
        return cls(sent, received)


class _WithNeighbours(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, part: Part, around: Around, dim: int) -> Tensor:
        plan = _Plan.of(part, around)
        ctx.part, ctx.plan, ctx.dim = part, plan, dim
        rows = x.movedim(dim, 0)
        sent = torch.cat([rows[start:end] for start, end in plan.sent])
        received = part.exchange(sent, [end - start for start, end in plan.sent], plan.received)
        ctx.ahead = sum(plan.received[: part.rank])
        return torch.cat((received[: ctx.ahead], rows, received[ctx.ahead :])).movedim(0, dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        part, plan, rows = ctx.part, ctx.plan, grads[0].movedim(ctx.dim, 0)
        n = part.length // part.size
        own = rows[ctx.ahead : ctx.ahead + n].clone()
        others = torch.cat((rows[: ctx.ahead], rows[ctx.ahead + n :]))
        counts = [end - start for start, end in plan.sent]
        returned = part.exchange(others, plan.received, counts).split(counts)
        for (start, end), piece in zip(plan.sent, returned, strict=True):
            own[start:end] += piece
        return own.movedim(0, ctx.dim), None, None, None
