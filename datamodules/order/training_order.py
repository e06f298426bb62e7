"""The order of training windows: a function of (seed, step, global batch), computed for any step directly.

Training reads an endless sequence of windows; slot s of a step's global batch is position step * global_batch + s. With
one group of n windows, each n positions (an epoch) are a keyed permutation of the windows. With a mixture, each group
has its exact share of every `CYCLE` positions, at places that a keyed permutation of the cycle chooses, and its own
endless sequence with its own epochs. Nothing is shuffled in memory.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from megabase.datamodules.config import CYCLE, mixture_quotas
from megabase.datamodules.order.hashing import Purpose, counted, derived, mix, word
from megabase.datamodules.order.permutation import Permutation


@dataclass(frozen=True)
class Order:
    """The endless training sequence over groups of windows.

    Attributes:
        seed: any integer.
        bounds: (groups + 1,) group g holds the window ids [bounds[g], bounds[g + 1]), at least one.
        weights: (groups,) each above 0, in any unit; ignored with one group.
    """

    seed: int
    bounds: tuple[int, ...]
    weights: tuple[float, ...] = (1.0,)

    def of_step(self, step: int, global_batch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Window ids and epochs (global_batch,) of an optimizer step, the same for any ranks and workers."""
        return self.at(step * global_batch + np.arange(global_batch, dtype=np.int64))

    def at(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Positions (>= 0, any shape) -> window ids, and the epoch of each window's group; same shape."""
        if len(self.weights) == 1:
            first, end = self.bounds
            epochs, within = np.divmod(np.asarray(positions, np.int64), end - first)
            return first + Permutation(epoch_keys(self.seed, epochs), end - first)(within), epochs
        cycles, slots = np.divmod(np.asarray(positions, np.int64), CYCLE)
        seed = derived(word(self.seed), Purpose.MIXTURE)
        places = Permutation(counted(seed, cycles), CYCLE)(slots)
        quotas = np.array(self.quotas)
        ends = np.cumsum(quotas)
        group = np.searchsorted(ends, places, side="right")
        turns = cycles * quotas[group] + places - (ends - quotas)[group]
        samples, epochs = np.empty_like(turns), np.empty_like(turns)
        for number in np.unique(group):
            mine = group == number
            samples[mine], epochs[mine] = self._of_group(int(number)).at(turns[mine])
        return samples, epochs

    @cached_property
    def quotas(self) -> tuple[int, ...]:
        """Positions of each group in a cycle."""
        return mixture_quotas(self.weights)

    def _of_group(self, group: int) -> "Order":
        """The sequence of one group."""
        seed = counted(derived(word(self.seed), Purpose.GROUP), np.array([group]))
        return Order(int(seed[0]), self.bounds[group : group + 2])


def epoch_keys(seed: int, epochs: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Epochs (any shape, at least 1-d) -> the keys of their permutations, uint64 of the same shape."""
    return counted(mix(word(seed)), epochs)


def slots(turn: int, rank: int, world_size: int, micro_batch: int) -> slice:
    """The slots of a global batch that are a rank's micro batch number `turn` of that step."""
    first = (turn * world_size + rank) * micro_batch
    return slice(first, first + micro_batch)
