"""The groups of ranks of a run, and how ranks exchange small objects and decisions in them.

All of it goes over gloo, on the host, never through the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

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
        data: the processes that train on different windows. Use its size to divide windows: for the micro batches of a
            step, a rank's share of a batch and the average of gradients. Today every process trains on its own
            windows, so `data` equals `world`. If several ranks shared one sequence, `data` would be smaller.
    """

    world: Group
    data: Group

    @classmethod
    def create(cls) -> Groups:
        """The groups of a run, after `rendezvous.start`. All ranks must call it."""
        world = Group.of_all_ranks()
        return cls(world, data=world)
