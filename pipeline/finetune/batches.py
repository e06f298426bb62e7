"""Examples as numbered micro batches. Which examples make a step is a function of (seed, step), as in pretraining.

Sequences of different length are padded at their ends. Padding has no label and is left out of the pooling. A strictly
causal model computes the same for a sequence whatever follows it, so a batch is as long as its step needs. For all
other models every batch has `data.length`, so that an example's result does not depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from typing import Any, NamedTuple

import numpy as np
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from megabase.datamodules.alphabet import BOS, PAD, Alphabet
from megabase.datamodules.batches.collate import FILLER, IGNORE
from megabase.datamodules.batches.numbered import NumberedBatches, Place
from megabase.datamodules.config import accumulation
from megabase.datamodules.datamodule import make_loader
from megabase.datamodules.index.segments import TRAIN, VALID
from megabase.datamodules.order.hashing import Purpose, derived, uniform, visit_keys
from megabase.datamodules.order.training_order import Order, slots
from megabase.pipeline.config.schema import RunConfig
from megabase.pipeline.finetune.examples import Examples
from megabase.pipeline.finetune.layout import Layout

STEP = 64
"""Batches have a multiple of so many tokens, so that few shapes occur."""


class ExampleBatch(NamedTuple):
    """One micro batch.

    Attributes:
        codes: (batch, length) uint8 or int16 tokens, `PAD` after the end.
        lengths: (batch,) int64 tokens of each sequence; 0 for filler.
        labels: int64 class numbers, IGNORE for no label; or int32, the bits of fp32 numbers, NaN for no label
            (Lightning would round floats to the precision of the model). (batch,), or per base (batch, bases).
        samples: (batch,) int64 numbers of the examples, FILLER for filler.
        targets: labels in the global batch, over all ranks and micro batches.
    """

    codes: Tensor
    lengths: Tensor
    labels: Tensor
    samples: Tensor
    targets: float


@dataclass(frozen=True, eq=False)
class Encoder:
    """Makes batches of examples.

    Attributes:
        examples: all of them.
        alphabet: encodes them.
        layout: what a sequence looks like to the model.
    """

    examples: Examples
    alphabet: Alphabet
    layout: Layout

    @cached_property
    def sizes(self) -> NDArray[np.int64]:
        """Tokens of each example."""
        sizes = np.array([len(each) for each in self.examples.sequences], np.int64)
        return sizes + self.layout.before

    @cached_property
    def labels_of_each(self) -> NDArray[np.int64]:
        """Number of labels of each example."""
        if not self.examples.problem.per_base:
            return np.ones(len(self.examples), np.int64)
        return np.array([np.count_nonzero(~np.isnan(each)) for each in self.examples.labels], np.int64)

    def width(self, samples: NDArray[np.int64]) -> int:
        """Tokens of the batches of a step that holds these examples."""
        if not self.layout.strict:
            return self.layout.length
        longest = int(self.sizes[samples[samples >= 0]].max(initial=1))
        return min(-(-longest // STEP) * STEP, self.layout.length)

    def batch(
        self, samples: NDArray[np.int64], turned: NDArray[np.bool_], width: int, targets: int
    ) -> ExampleBatch:
        """A micro batch.

        Args:
            samples: numbers of the examples, FILLER for filler.
            turned: which are read on the other strand.
            width: tokens of the batch.
            targets: see ExampleBatch.
        """
        before, problem = self.layout.before, self.examples.problem
        codes = np.full((len(samples), width), PAD, self.alphabet.table.dtype)
        shape = (len(samples), width - before) if problem.per_base else (len(samples),)
        labels = np.full(shape, np.nan)
        for row, (sample, turn) in enumerate(zip(samples.tolist(), turned.tolist(), strict=True)):
            if sample < 0:
                continue
            letters = np.frombuffer(self.examples.sequences[sample], np.uint8)
            label = self.examples.labels[sample]
            if turn:
                letters = self.alphabet.reverse_complement(letters)
                label = label[::-1] if problem.per_base else label
            codes[row, before : before + len(letters)] = self.alphabet.encode(letters)
            codes[row, :before] = BOS
            if problem.per_base:
                labels[row, : len(letters)] = label
            else:
                labels[row] = label
        lengths = np.where(samples >= 0, self.sizes[samples], 0)
        return ExampleBatch(
            torch.from_numpy(codes),
            torch.from_numpy(lengths),
            self._targets(labels),
            torch.from_numpy(samples),
            float(targets),
        )

    def _targets(self, labels: NDArray[np.float64]) -> Tensor:
        problem = self.examples.problem
        if problem.classes:
            return torch.from_numpy(np.where(np.isnan(labels), IGNORE, labels).astype(np.int64))
        scaled = ((labels - problem.mean) / problem.scale).astype(np.float32)
        return torch.from_numpy(scaled.view(np.int32))


class TrainExamples(NumberedBatches):
    """The endless training micro batches of one rank, from optimizer step `first_step` on; see TrainBatches.

    Args:
        encoder: makes the batches.
        place: of this process.
        config: of the run.
        first_step: to begin with.
    """

    def __init__(self, encoder: Encoder, place: Place, config: RunConfig, first_step: int = 0) -> None:
        self.encoder, self.place, self.config, self.first_step = encoder, place, config, first_step
        self.accumulation = accumulation(config.data.global_batch, place.micro_batch, place.world_size)
        self.chosen = encoder.examples.of(TRAIN)
        self.order = Order(config.run.seed, (0, len(self.chosen)))

    def numbers(self) -> Iterable[int]:
        return count(self.first_step * self.accumulation)

    def of_step(self, step: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """The examples of an optimizer step, counted from 0, and which of them are read on the other strand."""
        turns, epochs = self.order.of_step(step, self.config.data.global_batch)
        samples = self.chosen[turns]
        drawn = derived(visit_keys(self.config.run.seed, epochs, samples), Purpose.STRAND)
        return samples, uniform(drawn) < self.config.data.reverse_complement

    def batch(self, number: int) -> Any:
        step, turn = divmod(number, self.accumulation)
        samples, turned = self.of_step(step)
        place = self.place
        mine = slots(turn, place.rank, place.world_size, place.micro_batch)
        targets = int(self.encoder.labels_of_each[samples].sum())
        return self.encoder.batch(samples[mine], turned[mine], self.encoder.width(samples), targets)


class EvalExamples(NumberedBatches):
    """Every example of a choice once, in order; the ranks take turns, and filler completes the last batch.

    Args:
        encoder: makes the batches.
        place: of this process.
        chosen: numbers of the examples.
    """

    def __init__(self, encoder: Encoder, place: Place, chosen: NDArray[np.int64]) -> None:
        self.encoder, self.place, self.chosen = encoder, place, chosen

    def __len__(self) -> int:
        return -(-len(self.chosen) // (self.place.micro_batch * self.place.world_size))

    def numbers(self) -> Iterable[int]:
        return range(len(self))

    def batch(self, number: int) -> Any:
        place = self.place
        together = place.micro_batch * place.world_size
        samples = np.full(together, FILLER, np.int64)
        found = self.chosen[number * together : (number + 1) * together]
        samples[: len(found)] = found
        mine = slots(0, place.rank, place.world_size, place.micro_batch)
        targets = int(self.encoder.labels_of_each[found].sum())
        return self.encoder.batch(
            samples[mine], np.zeros(place.micro_batch, bool), self.encoder.width(found), targets
        )


class ExampleData(pl.LightningDataModule):
    """The loaders of one rank.

    Args:
        encoder: makes the batches.
        config: of the run.
    """

    def __init__(self, encoder: Encoder, config: RunConfig) -> None:
        super().__init__()
        self.encoder, self.config = encoder, config

    @property
    def place(self) -> Place:
        """Which batches this process makes."""
        rank, ranks = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        return Place(rank, ranks, self.config.data.micro_batch)

    def training(self, first_step: int = 0) -> TrainExamples:
        """The batches of training."""
        return TrainExamples(self.encoder, self.place, self.config, first_step)

    def train_dataloader(self) -> DataLoader[Any]:
        """Endless micro batches from the trainer's global step on."""
        return make_loader(self.training(self.trainer.global_step if self.trainer else 0), self.config.data)

    def validation(self) -> Iterator[Any]:
        """Every validation example once."""
        chosen = self.encoder.examples.of(VALID)
        return iter(EvalExamples(self.encoder, self.place, chosen))
