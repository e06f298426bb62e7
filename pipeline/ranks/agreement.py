"""Decisions that all ranks take at the same step, without synchronising the device.

At the end of step s every rank starts a small all-reduce on the host (gloo), and reads the result of step s-1, which
has usually arrived by then. So all ranks take the same decision at the same step, without waiting for each other. The
same message sums up hashes of the samples that each rank consumed, for the journal.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from megabase.datamodules.order.hashing import GOLDEN, mix
from megabase.pipeline.ranks.groups import Group


@dataclass(frozen=True)
class Agreed:
    """What all ranks agreed on for one finished step.

    Attributes:
        step: number of the step, from 1.
        stop: some rank wants to stop.
        save: some rank wants a checkpoint.
        progress: the smallest `Saver.progress` of all ranks.
        samples: sum over ranks of `hash_samples`, modulo 2^64.
        trouble: rank 0 has found bad numbers: the run must end.
    """

    step: int
    stop: bool
    save: bool
    progress: int
    samples: int
    trouble: bool = False


class Agreement:
    """One small sum over all ranks per step, read one step later.

    Args:
        world: every process of the run.
    """

    def __init__(self, world: Group) -> None:
        self._world = world
        self._pending: tuple[int, torch.Tensor, dist.Work] | None = None

    def exchange(
        self, step: int, *, stop: bool, save: bool, progress: int, samples: int, trouble: bool = False
    ) -> Agreed | None:
        """Send this rank's part for `step`; the arguments are the fields of `Agreed`.

        Returns:
            The agreement on the step of the call before; None at the first call and after `settle`.
        """
        previous = self.settle()
        # The smallest progress of all ranks, from sums: how many ranks have reached 1, and how many 2.
        sent = [int(stop), int(save), int(progress > 0), int(progress > 1), samples, int(trouble)]
        counters = torch.tensor(sent, dtype=torch.int64)
        self._pending = (step, counters, self._world.sum_async(counters))
        return previous

    def settle(self) -> Agreed | None:
        """Wait for the exchange that is under way and return its result; None if there is none."""
        if self._pending is None:
            return None
        step, counters, work = self._pending
        work.wait()
        self._pending = None
        stop, save, written, published, samples, trouble = counters.tolist()
        progress = (written == self._world.size) + (published == self._world.size)
        return Agreed(step, stop > 0, save > 0, progress, samples % 2**64, trouble > 0)


def hash_samples(ids: Iterable[int]) -> int:
    """The 64-bit sum of mixed sample ids, as a signed integer: the same for any order and for any split over ranks.

    Each id goes through splitmix64 (Steele, Lea and Flood, OOPSLA 2014), so that different sets of ids with the same
    sum have different hashes.
    """
    words = np.array([sample % 2**64 for sample in ids], np.uint64)
    return int(mix(words + np.uint64(GOLDEN)).sum(dtype=np.uint64).astype(np.int64))
