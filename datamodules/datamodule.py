"""The LightningDataModule: makes the loaders of one rank from shards and settings.

Rank, number of ranks and the step to continue from come from the trainer; without a trainer, there is one process at
step 0. The trainer's step decides which window comes next, so there is no state to save.
"""

import logging
import signal
import warnings
from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from megabase.datamodules.batches.collate import Batch
from megabase.datamodules.batches.numbered import EvalBatches, NumberedBatches, Place, TrainBatches
from megabase.datamodules.batches.visits import Windows, evaluation_windows, training_windows
from megabase.datamodules.config import DataConfig, accumulation
from megabase.datamodules.errors import DataError
from megabase.datamodules.index.segments import TEST, VALID, Part
from megabase.datamodules.index.shard_index import ShardIndex
from megabase.datamodules.order.mixture import identity_of
from megabase.datamodules.processes import end_with_parent, signals_blocked
from megabase.datamodules.report import recall

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

log = logging.getLogger(__name__)


class SequenceDataModule(pl.LightningDataModule):
    """Loaders of the splits of a shard directory; each item is a micro batch (`Batch`)."""

    def __init__(self, config: DataConfig, seed: int, sequence_ranks: int = 1) -> None:
        """
        Args:
            config: the settings.
            seed: of the training order, augmentation and masks; any integer.
            sequence_ranks: how many consecutive ranks share each window. Rank r gets the batches of place r //
                sequence_ranks, and of every window its part number r % sequence_ranks.
        """
        super().__init__()
        self.config = config
        self.seed = seed
        self.sequence_ranks = sequence_ranks

    @cached_property
    def index(self) -> ShardIndex:
        """The opened shards; raises as `ShardIndex.open`. The model needs `index.alphabet.vocab_size`."""
        return ShardIndex.open(self.config.shards)

    @property
    def identity(self) -> str:
        """A checksum of the data that decides the order of training; without the seed and the settings."""
        return identity_of(self.index.segments, self.config.mixture)

    @property
    def accumulation(self) -> int:
        """Micro batches per rank and optimizer step. Raises DataError if the sizes do not fit the ranks."""
        return accumulation(self.config.global_batch, self.config.micro_batch, self._place.world_size)

    @property
    def has_validation(self) -> bool:
        """Whether the split "valid" has a window."""
        return self._validation is not None

    @property
    def validation_windows(self) -> int:
        """Number of windows of the split "valid"."""
        return 0 if self._validation is None else len(self._validation.plan)

    @property
    def has_case(self) -> bool:
        """Whether lower case marks repeats in the alphabet."""
        return self._validation is not None and self._validation.has_case

    def windows(self, split: str) -> Windows:
        """The windows of a split for evaluation. Raises DataError if there is none."""
        return evaluation_windows(self.config, self.index, split)

    def training_windows(self) -> Windows:
        """The windows to train on. Raises DataError if there is none, or a setting does not fit the data."""
        return training_windows(self.config, self.index)

    def _cut(self, windows: Windows) -> Windows:
        """The windows, of which batches hold this rank's part."""
        if self.sequence_ranks == 1:
            return windows
        share = self.config.length // self.sequence_ranks
        start = self._rank % self.sequence_ranks * share
        return replace(windows, cut=(start, start + share))

    def setup(self, stage: str) -> None:
        """Check the settings and the windows of `stage` ("fit", "validate" or "test"); raises DataError."""
        self.config.validate()
        if stage == "fit":
            _ = self.accumulation, self._training, self._validation
        elif stage in ("validate", "test"):
            self.windows(VALID if stage == "validate" else TEST)

    def train_dataloader(self) -> DataLoader[Batch]:
        """Endless micro batches from the trainer's global step on."""
        step = self.trainer.global_step if self.trainer else 0
        windows = self._cut(self._training)
        batches = TrainBatches(windows, self._place, self.seed, self.accumulation, step)
        return make_loader(batches, self.config)

    def val_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        """Every validation window once; an empty list if there is none."""
        return self.some_validation(0)

    def some_validation(self, most: int) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        """`most` validation windows, spread evenly over the split (0: all); an empty list if there is none.

        The batches say which letters are in lower case, if that marks repeats.
        """
        return [] if self._validation is None else self._eval_loader(self._validation.with_case(), most)

    def validation_parts(self, most: int) -> list[Part]:
        """The parts of segments in the windows of `some_validation(most)`; empty if there is none."""
        if self._validation is None:
            return []
        batches = EvalBatches(self._validation, self._place, most)
        return self._validation.parts(batches.chosen(np.arange(batches.count)))

    def recall_probe(self, most: int) -> tuple[Iterable[Batch], Iterable[Batch]] | None:
        """Batches that measure recall: copies at the ends of validation windows with their sources, and without.

        Args:
            most: number of windows, spread evenly over the split. They take turns with the distances that fit.

        Returns:
            None if there is no validation window, or `data.length` is too short for a copy.
        """
        if self._validation is None or (copy := self._copy) is None:
            return None
        gaps = recall.distances(self.config.length, copy)
        windows = self._cut(self._validation)
        batches = partial(recall.probe_batches, windows, self._place, most, copy, gaps=gaps)
        return batches(recall.Source(copy)), batches(None)

    def test_dataloader(self) -> DataLoader[Batch]:
        """Every test window once."""
        return self.eval_dataloader(TEST)

    def eval_dataloader(self, split: str) -> DataLoader[Batch]:
        """Every window of a split once, in order, shared out among the ranks (see `EvalBatches`)."""
        return self._eval_loader(self.windows(split))

    @cached_property
    def _training(self) -> Windows:
        windows = self.training_windows()
        if (bases := windows.plan.left_out) and self._rank == 0:
            log.warning(
                "%s bases for training lie in parts of records shorter than data.length %s and are left out:"
                " data.pack=true trains on them too",
                f"{bases:,}",
                f"{self.config.length:,}",
            )
        return windows

    @cached_property
    def _validation(self) -> Windows | None:
        if VALID not in self.index.segments.splits():
            return None
        try:
            return self.windows(VALID)
        except DataError as error:
            log.warning("training goes on without validation: %s", error)
            return None

    @cached_property
    def _copy(self) -> int | None:
        """Bases of the copies in a probe of recall; None if they do not fit."""
        copy = recall.copy_length(self.config.length)
        if copy is None and self._rank == 0:
            log.info("recall is not measured: windows of data.length %s are too short", self.config.length)
        return copy

    @property
    def _rank(self) -> int:
        return self.trainer.global_rank if self.trainer else 0

    @property
    def _place(self) -> Place:
        world_size = self.trainer.world_size if self.trainer else self.sequence_ranks
        parts = self.sequence_ranks
        return Place(self._rank // parts, world_size // parts, self.config.micro_batch)

    def _eval_loader(self, windows: Windows, most: int = 0) -> DataLoader[Batch]:
        # Lightning warns that workers may repeat the batches of an iterable data set: those of NumberedBatches do not.
        warnings.filterwarnings("ignore", message="Your `IterableDataset` has `__len__` defined")
        return make_loader(EvalBatches(self._cut(windows), self._place, most), self.config)


def make_loader(batches: NumberedBatches, config: DataConfig) -> DataLoader[Any]:
    """A loader of these batches, with as many readers as `data.workers` says."""
    return _Loader(
        batches,
        batch_size=None,
        collate_fn=_unchanged,
        num_workers=config.workers,
        prefetch_factor=config.prefetch if config.workers else None,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_prepare_reader,
        multiprocessing_context="fork" if config.workers else None,
    )


class _Loader(DataLoader[Any]):
    """Blocks stop signals while its readers start, so that none reaches a reader before `_prepare_reader` has run.

    The readers must be forked, whatever the default start method is: they inherit the blocked signals, and the rank is
    their parent, with which they end. A signal that the rank receives meanwhile is delivered to it right afterwards.
    """

    def __iter__(self) -> Any:
        with signals_blocked(_STOP_SIGNALS):
            return super().__iter__()


def _unchanged(batch: Any) -> Any:
    """Replaces torch's `default_convert`, which would go through every field of a batch."""
    return batch


def _prepare_reader(worker: int) -> None:
    """In a reader process: ignore stop signals, and end when the rank ends (Linux).

    SLURM signals the whole process group: the rank needs its readers until it has saved a checkpoint. A reader must not
    outlive a rank that was killed.
    """
    for signum in _STOP_SIGNALS:
        signal.signal(signum, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)
    end_with_parent()
