"""The groups of ranks of a run, and how ranks exchange small objects and decisions in them.

All of it goes over gloo, on the host, never through the device; except what the ranks that share a window exchange of
it, which goes over the backend of the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megabase.datamodules.batches.numbered import Place
from megabase.models.sequence import Group as Exchange
from megabase.models.sequence import Part
from megabase.pipeline.errors import RunError
from megabase.pipeline.ranks.rendezvous import STARTING_TIMEOUT


class Group:
    """A group of ranks.

    Attributes:
        rank: this process's number in the group, from 0.
        size: number of ranks in the group.
        handle: torch's process group.
    """

    def __init__(self, handle: dist.ProcessGroup) -> None:
        self.handle = handle
        self.rank = dist.get_rank(handle)
        self.size = dist.get_world_size(handle)

    @classmethod
    def of_all_ranks(cls) -> Group:
        """A new group of every process, over gloo. All ranks must call it, in the same order."""
        return cls(dist.new_group(backend="gloo", timeout=STARTING_TIMEOUT))

    def broadcast(self, value: Any) -> Any:
        """The `value` of rank 0 of the group, on every rank."""
        values = [value]
        dist.broadcast_object_list(values, group_src=0, group=self.handle)
        return values[0]

    def gather(self, value: Any) -> list[Any]:
        """The `value` of every rank, on every rank, in the order of ranks."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.handle)
        return values

    def sum_async(self, counters: torch.Tensor) -> dist.Work:
        """Start to sum `counters` (int64, on the host) over the ranks, in place; `wait()` on the result for the sum."""
        return dist.all_reduce(counters, group=self.handle, async_op=True)

    def check(self, error: str | None, *, temporary: bool = False) -> None:
        """Raise RunError on every rank if any rank passes an error.

        Args:
            error: what is wrong on this rank; None if nothing is.
            temporary: whether another start may succeed (`RunError.temporary`).
        """
        errors = [f"rank {rank}: {text}" for rank, text in enumerate(self.gather(error)) if text]
        if errors:
            raise RunError("; ".join(errors), temporary=temporary)


@dataclass(frozen=True)
class Groups:
    """The groups that this process belongs to.

    Attributes:
        world: every process of the run. Use its size to count processes: those that write files of a checkpoint, take
            part in a decision or wait at a barrier. A manifest's `ranks` is this size.
        sequence_ranks: how many consecutive processes share each window (`trainer.sequence_ranks`).
        exchange: with the processes that share this one's windows; None: no other does.
    """

    world: Group
    sequence_ranks: int = 1
    exchange: Exchange | None = None

    @classmethod
    def create(cls, sequence_ranks: int = 1) -> Groups:
        """The groups of a run, after `rendezvous.start`. All ranks must call it."""
        world = Group.of_all_ranks()
        if sequence_ranks == 1:
            return cls(world)
        # Every rank makes every group, in the same order.
        shared = [
            dist.new_group(list(range(first, first + sequence_ranks)))
            for first in range(0, world.size, sequence_ranks)
        ]
        return cls(world, sequence_ranks, Exchange(shared[world.rank // sequence_ranks]))

    @property
    def data_size(self) -> int:
        """How many windows are trained on at a time. Use it to divide windows: for the micro batches of a step."""
        return self.world.size // self.sequence_ranks

    @property
    def holds_start(self) -> bool:
        """Whether this process holds the first positions of its windows: one of those that share a window does."""
        return self.world.rank % self.sequence_ranks == 0

    def place(self, micro_batch: int) -> Place:
        """Which windows this process takes, `micro_batch` at a time."""
        return Place(self.world.rank // self.sequence_ranks, self.data_size, micro_batch)

    def part(self, length: int) -> Part | None:
        """The part of every window of `length` positions that this process holds; None: all of it."""
        if self.exchange is None:
            return None
        return Part(self.world.rank % self.sequence_ranks, self.sequence_ranks, length, self.exchange)

    def summed(self, of_ranks: Sequence[list[float]]) -> list[list[float]]:
        """Lists of all ranks, summed over the ranks that share a window: one list for each of `data_size`."""
        parts = self.sequence_ranks
        groups = [of_ranks[first : first + parts] for first in range(0, len(of_ranks), parts)]
        return [[sum(numbers) for numbers in zip(*group, strict=True)] for group in groups]
