"""What one rank wants becomes what all ranks do, at one step, without a device synchronisation.

At the end of step s every rank starts a small all-reduce on the host (gloo) and reads that of step s-1, which has
long finished: so all ranks learn the same thing at the same step, and nobody waits. The same message carries a
sum of hashes of the samples that each rank really consumed, for the journal.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megabase.pipeline.ranks.launch import Ranks


@dataclass(frozen=True)
class Agreed:
    """What all ranks know of one finished step.

    stop, save: a rank wants that. progress: how much of saving a checkpoint every rank is done with (`Saver.progress`).
    samples: sum over ranks of `hash_samples`, modulo 2^64. trouble: the books of rank 0 forbid to go on.
    """

    step: int
    stop: bool
    save: bool
    progress: int
    samples: int
    trouble: bool = False


class Agreement:
    """One small sum over ranks per step, read one step later."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._pending: tuple[int, torch.Tensor, dist.Work] | None = None

    def exchange(
        self, step: int, *, stop: bool, save: bool, progress: int, samples: int, trouble: bool = False
    ) -> Agreed | None:
        """Tell the others about `step`; return what was agreed about the step before (None: there is none)."""
        previous = self.settle()
        told = [int(stop), int(save), int(progress > 0), int(progress > 1), samples, int(trouble)]
        counters = torch.tensor(told, dtype=torch.int64)
        self._pending = (step, counters, self._ranks.sum_async(counters))
        return previous

    def settle(self) -> Agreed | None:
        """Wait for the message under way, if any, and return it."""
        if self._pending is None:
            return None
        step, counters, work = self._pending
        work.wait()
        self._pending = None
        stop, save, written, named, samples, trouble = counters.tolist()
        progress = (written == self._ranks.size) + (named == self._ranks.size)
        return Agreed(step, stop > 0, save > 0, progress, samples % 2**64, trouble > 0)


def hash_samples(ids: Iterable[int]) -> int:
    """A 64-bit sum, as a signed integer, of mixed sample ids: the order and the rank of a sample do not matter.

    Each id goes through splitmix64's finaliser (Steele et al. 2014), so that sets of ids with equal sums differ.
    """
    mask = 2**64 - 1
    total = 0
    for sample in ids:
        x = (sample + 0x9E3779B97F4A7C15) & mask
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        total = (total + (x ^ (x >> 31))) & mask
    return total - 2**64 if total >= 2**63 else total
