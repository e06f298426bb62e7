"""Numbered micro batches: a data set is a function from a number to a batch.

It is iterable, not one with a sampler, because Lightning replaces samplers when it runs distributed. Each of k
workers takes every k-th number, and the DataLoader asks them in turn: so any number of workers gives the same
batches in the same order.
"""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import IterableDataset, get_worker_info

from datamodules.collate import FILLER, Batch, causal_batch, masked_batch, masked_count
from datamodules.hashing import visit_keys
from datamodules.index import ShardIndex
from datamodules.windows import WindowPlan, epochs_of_step, samples_of_step, slots

EVALUATION_SEED = 0
"""Of what is masked in evaluation: the same for every run, so that runs can be compared."""


@dataclass(frozen=True, eq=False)
class Windows:
    """The windows of a split, readable: a plan, the shards it was made for, and what is to be predicted.

    mask_rate: share of the letters that are masked bases to predict; None predicts every next base.
    """

    index: ShardIndex
    plan: WindowPlan
    mask_rate: float | None = None

    def targets(self, samples: NDArray[np.int64]) -> int:
        """Number of labels in the windows `samples`, known from the index alone; -1 is filler and has none."""
        letters = self.plan.letters(samples[samples != FILLER])
        counts = letters if self.mask_rate is None else masked_count(letters, self.mask_rate)
        return int(counts.sum())

    def batch(self, samples: NDArray[np.int64], keys: NDArray[np.uint64], targets: int) -> Batch:
        """The batch of window ids (batch,), -1 for filler. keys: (batch,), see `hashing.visit_keys`."""
        sequences = np.zeros((len(samples), self.plan.length), np.uint8)
        real = np.flatnonzero(samples != FILLER)
        for slot, row, start in zip(real, *self.plan.locate(samples[real]), strict=True):
            sequences[slot] = self.index.read(row, start, self.plan.length)
        alphabet = self.index.alphabet
        if self.mask_rate is None:
            return causal_batch(sequences, samples, alphabet, targets)
        return masked_batch(sequences, samples, alphabet, targets, keys=keys, rate=self.mask_rate)


@dataclass(frozen=True)
class Place:
    """Where a process stands: its rank, how many there are, and the windows each takes at once."""

    rank: int
    world_size: int
    micro_batch: int


class NumberedBatches(IterableDataset[Batch], ABC):
    """Batches by number; iterating gives `numbers()` in order, every k-th of them in each of k workers."""

    @abstractmethod
    def numbers(self) -> Iterable[int]:
        """The numbers of the batches, in order."""

    @abstractmethod
    def batch(self, number: int) -> Batch:
        """The batch of that number."""

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        first, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        return map(self.batch, itertools.islice(self.numbers(), first, None, stride))


class TrainBatches(NumberedBatches):
    """The endless training micro batches of one rank, from optimizer step `first_step` on.

    Number b is micro batch b % accumulation of step b // accumulation.
    """

    def __init__(
        self, windows: Windows, place: Place, seed: int, accumulation: int, first_step: int = 0
    ) -> None:
        self.windows = windows
        self.place = place
        self.seed = seed
        self.accumulation = accumulation
        self.first_step = first_step

    def numbers(self) -> Iterable[int]:
        return itertools.count(self.first_step * self.accumulation)

    def batch(self, number: int) -> Batch:
        step, turn = divmod(number, self.accumulation)
        place, plan = self.place, self.windows.plan
        global_batch = place.micro_batch * place.world_size * self.accumulation
        samples = samples_of_step(self.seed, step, global_batch, len(plan))
        keys = visit_keys(self.seed, epochs_of_step(step, global_batch, len(plan)), samples)
        mine = slots(turn, place.rank, place.world_size, place.micro_batch)
        return self.windows.batch(samples[mine], keys[mine], self.windows.targets(samples))


class EvalBatches(NumberedBatches):
    """Every window of a split once, in order, dealt to the ranks a micro batch at a time.

    most: if above 0 and below the number of windows, so many of them, spread evenly over the split; always the
    same. Masked bases are always the same too, whatever the seed of training. All ranks have the same number of
    batches: what is missing at the end is filler (sample -1, no labels). The `targets` of a batch count the labels
    of that batch number over all ranks.
    """

    def __init__(self, windows: Windows, place: Place, most: int = 0) -> None:
        self.windows = windows
        self.place = place
        total = len(windows.plan)
        self.count = min(most, total) if most > 0 else total

    def __len__(self) -> int:
        return -(-self.count // (self.place.micro_batch * self.place.world_size))

    def numbers(self) -> Iterable[int]:
        return range(len(self))

    def batch(self, number: int) -> Batch:
        place, plan = self.place, self.windows.plan
        together = place.micro_batch * place.world_size
        turns = number * together + np.arange(together)
        samples = np.where(turns < self.count, turns * len(plan) // self.count, FILLER)
        keys = visit_keys(EVALUATION_SEED, np.zeros_like(samples), samples)
        mine = slots(0, place.rank, place.world_size, place.micro_batch)
        return self.windows.batch(samples[mine], keys[mine], self.windows.targets(samples))
