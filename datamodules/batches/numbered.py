"""Numbered micro batches: a data set is a function from a number to a batch.

It is an iterable data set, without a sampler, because Lightning replaces samplers in distributed runs. Each of k
workers makes every k-th batch, and the DataLoader takes them in turn, so any number of workers gives the same batches
in the same order.
"""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import IterableDataset, get_worker_info

from megabase.datamodules.batches.collate import FILLER, Batch
from megabase.datamodules.batches.visits import Visits, Windows
from megabase.datamodules.order.hashing import visit_keys
from megabase.datamodules.order.training_order import Order, slots

_PLANNED = 4096
"""About so many windows are planned at once."""

EVALUATION_SEED = 0
"""Seed of the masks in evaluation: the same for every run, so that runs can be compared."""


@dataclass(frozen=True)
class Place:
    """Which batches a process makes.

    Attributes:
        rank: of this process among those that share out a global batch.
        world_size: number of these processes.
        micro_batch: windows of one forward pass on one rank.
    """

    rank: int
    world_size: int
    micro_batch: int


class NumberedBatches(IterableDataset[Any], ABC):
    """Batches by number. Iterating yields those of `numbers()` in order; each of k workers makes every k-th of them."""

    @abstractmethod
    def numbers(self) -> Iterable[int]:
        """The numbers of the batches, in order."""

    @abstractmethod
    def batch(self, number: int) -> Any:
        """The batch with a number."""

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        first, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        return map(self.batch, itertools.islice(self.numbers(), first, None, stride))


class TrainBatches(NumberedBatches):
    """The endless training micro batches of one rank, from optimizer step `first_step` on.

    Batch number b is micro batch b % accumulation of step b // accumulation.
    """

    def __init__(
        self, windows: Windows, place: Place, seed: int, accumulation: int, first_step: int = 0
    ) -> None:
        self.windows = windows
        self.place = place
        self.seed = seed
        self.accumulation = accumulation
        self.first_step = first_step
        self.order = Order(seed, windows.plan.bounds, windows.plan.weights)
        self._planned: _Steps | None = None

    def numbers(self) -> Iterable[int]:
        return itertools.count(self.first_step * self.accumulation)

    def batch(self, number: int) -> Batch:
        step, turn = divmod(number, self.accumulation)
        place, planned = self.place, self._plan_of(step)
        before = (step - planned.first) * self._global_batch
        mine = slots(turn, place.rank, place.world_size, place.micro_batch)
        visits = planned.visits.part(slice(before + mine.start, before + mine.stop))
        return self.windows.batch(visits, int(planned.targets[step - planned.first]))

    @property
    def _global_batch(self) -> int:
        return self.place.micro_batch * self.place.world_size * self.accumulation

    def _plan_of(self, step: int) -> "_Steps":
        """The plan of the block of steps that `step` is in: numpy plans many steps in about the time of one."""
        together = max(_PLANNED // self._global_batch, 1)
        first = step // together * together
        if self._planned is None or self._planned.first != first:
            samples, epochs = self.order.of_step(first // together, together * self._global_batch)
            visits = self.windows.visits(samples, visit_keys(self.seed, epochs, samples))
            self._planned = _Steps(first, visits, visits.labels.reshape(together, -1).sum(axis=1))
        return self._planned


class _Steps(NamedTuple):
    """The plan of the steps from `first` on: visits of all ranks, and number of labels of each step."""

    first: int
    visits: Visits
    targets: NDArray[np.int64]


class EvalBatches(NumberedBatches):
    """Every window of a split once, in order; the ranks take turns, a micro batch at a time.

    Masked bases are always the same, whatever the seed of training. All ranks have the same number of batches; filler
    (sample -1, no labels) completes the last one. The `targets` of a batch count the labels of that batch number over
    all ranks.
    """

    def __init__(self, windows: Windows, place: Place, most: int = 0) -> None:
        """
        Args:
            windows: of the split.
            place: of this process.
            most: number of windows to use, always the same ones, spread evenly over the split; 0 for all.
        """
        self.windows = windows
        self.place = place
        total = len(windows.plan)
        self.count = min(most, total) if most > 0 else total

    def __len__(self) -> int:
        return -(-self.count // (self.place.micro_batch * self.place.world_size))

    def numbers(self) -> Iterable[int]:
        return range(len(self))

    def chosen(self, turns: NDArray[np.int64]) -> NDArray[np.int64]:
        """The ids of the windows with these numbers, in [0, count)."""
        return turns * len(self.windows.plan) // self.count

    def batch(self, number: int) -> Batch:
        place = self.place
        together = place.micro_batch * place.world_size
        turns = number * together + np.arange(together)
        samples = np.where(turns < self.count, self.chosen(turns), FILLER)
        visits = self.windows.visits(samples, visit_keys(EVALUATION_SEED, np.zeros_like(samples), samples))
        mine = slots(0, place.rank, place.world_size, place.micro_batch)
        return self.windows.batch(visits.part(mine), int(visits.labels.sum()))
