"""In which order windows are met: a function of (seed, step, global batch), computed at the positions asked for.

Position p = step * global_batch + slot of an endless sequence. With one group of windows, every n positions (an
epoch) are a keyed permutation of the n windows. With a mixture of groups, positions come in cycles of `CYCLE`, in
which each group has its exact share, at places that a keyed permutation of the cycle chooses; what a group is
asked for is an endless sequence of its own, with epochs and permutations of its own. Nothing is shuffled in memory.
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

    seed: any integer. bounds: (groups + 1,) window ids; group g is [bounds[g], bounds[g + 1]), at least one window.
    weights: of each group, above 0, in any unit; ignored with one group.
    """

    seed: int
    bounds: tuple[int, ...]
    weights: tuple[float, ...] = (1.0,)

    def of_step(self, step: int, global_batch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Window ids and epochs (global_batch,) of an optimizer step, whatever the ranks and workers."""
        return self.at(step * global_batch + np.arange(global_batch, dtype=np.int64))

    def at(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Positions (>= 0, any shape) -> window ids, and how often each window had its turn before; same shape."""
        if len(self.weights) == 1:
            first, end = self.bounds
            epochs, within = np.divmod(np.asarray(positions, np.int64), end - first)
            return first + Permutation(epoch_keys(self.seed, epochs), end - first)(within), epochs
        cycles, slots = np.divmod(np.asarray(positions, np.int64), CYCLE)
        seed = derived(word(self.seed), Purpose.MIXTURE)
        dealt = Permutation(counted(seed, cycles), CYCLE)(slots)
        quotas = np.array(self.quotas)
        ends = np.cumsum(quotas)
        group = np.searchsorted(ends, dealt, side="right")
        turns = cycles * quotas[group] + dealt - (ends - quotas)[group]
        samples, epochs = np.empty_like(turns), np.empty_like(turns)
        for number in np.unique(group):
            mine = group == number
            samples[mine], epochs[mine] = self._alone(int(number)).at(turns[mine])
        return samples, epochs

    @cached_property
    def quotas(self) -> tuple[int, ...]:
        """Positions of each group in a cycle."""
        return mixture_quotas(self.weights)

    def _alone(self, group: int) -> "Order":
        """The sequence that a group is met in."""
        seed = counted(derived(word(self.seed), Purpose.GROUP), np.array([group]))
        return Order(int(seed[0]), self.bounds[group : group + 2])


def epoch_keys(seed: int, epochs: NDArray[np.int64]) -> NDArray[np.uint64]:
    """The keys of the permutations of epochs (any shape, at least 1-d) -> uint64, same shape."""
    return counted(mix(word(seed)), epochs)


def slots(turn: int, rank: int, world_size: int, micro_batch: int) -> slice:
    """Which slots of a global batch a rank takes in its micro batch number `turn` of that step."""
    first = (turn * world_size + rank) * micro_batch
    return slice(first, first + micro_batch)
