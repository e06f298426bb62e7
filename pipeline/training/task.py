"""What a run trains: its data, its module, its evaluations. All else of a training is the same for all tasks.

`Pretraining` (pretraining.py) is what `megabase train` does; `megabase finetune` has another task (pipeline/finetune).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megabase.pipeline.config.schema import RunConfig
from megabase.pipeline.ranks.groups import Group, Groups
from megabase.pipeline.rundir.journal import Row

if TYPE_CHECKING:  # Lightning takes seconds to import, and only ranks need it
    import pytorch_lightning as pl

    from megabase.pipeline.training.module import PretrainModule

# Puts the weights of step 0 into a model that every rank has built.
Initial = Callable[[Any], None]


@dataclass(frozen=True)
class Trial:
    """An evaluation under way, on every rank.

    Attributes:
        score: one batch as it comes from a loader -> the sums that the module's `validation_step` returns.
        stop: called before each batch; if it returns true, the evaluation ends. All ranks get the same answer.
        device: of these sums.
        group: the ranks to sum over.
    """

    score: Callable[[Any], dict[str, Tensor]]
    stop: Callable[[], bool]
    device: torch.device
    group: Any


class Task(ABC):
    """What differs from one kind of training to another. Made in the process that starts ranks, and in each rank.

    Attributes:
        command: of `megabase`, which starts a rank; the rank gets the same arguments.
        in_bits: the loss is that of predicting bases: the journal has it in bits per base, too.
        config: of the run.
    """

    command: str
    in_bits = False

    def __init__(self, config: RunConfig) -> None:
        self.config = config

    @abstractmethod
    def check(self, ranks: int) -> None:
        """Check settings, data and run directory before anything starts, and set `model.vocab_size`.

        Raises:
            UserError, DataError, ConfigError: the run cannot work on that many ranks.
        """

    @abstractmethod
    def warning(self, ranks: int) -> str | None:
        """What is worth knowing of a run that passed `check`; None: nothing."""

    @abstractmethod
    def has_finished(self, ranks: int) -> bool:
        """Whether it is certain, without starting ranks, that nothing is left to do; then it is logged."""

    @property
    @abstractmethod
    def data(self) -> pl.LightningDataModule:
        """The loaders of training. Always the same object."""

    @property
    @abstractmethod
    def identity(self) -> str:
        """A checksum of the data that decides the order of training."""

    @property
    @abstractmethod
    def alphabet(self) -> str:
        """Name of the alphabet of the tokens."""

    @property
    @abstractmethod
    def has_validation(self) -> bool:
        """Whether there is something to evaluate on."""

    @abstractmethod
    def initial(self, world: Group) -> Initial | None:
        """The weights of a start at step 0; None: random ones. All ranks call it.

        Raises:
            RunError: on every rank, if rank 0 cannot read them.
        """

    @abstractmethod
    def module(self, groups: Groups, initial: Initial | None) -> PretrainModule:
        """The module to train in these groups of ranks, with the weights of `initial` at step 0."""

    @abstractmethod
    def describe_data(self) -> None:
        """Write into the run directory what the run trains on. For rank 0. Raises OSError."""

    @abstractmethod
    def measure(self, trial: Trial, step: int) -> tuple[dict[str, float], dict[str, float] | None] | None:
        """Evaluate the model after optimizer step `step`. All ranks call it.

        Returns:
            Values by their names in the journal, `valid_loss` among them: of every evaluation, and of the whole
            validation split at the end of a run (None before). None if `trial.stop` ended it.
        """

    @abstractmethod
    def evaluation_row(self, step: int, subset: dict[str, float], full: dict[str, float] | None) -> Row:
        """The journal's row of what `measure` returned. For rank 0."""

    @abstractmethod
    def windows_of(self, step: int) -> list[dict[str, Any]]:
        """What training read in optimizer step `step`, counted from 1, in the order of the global batch.

        Each is a dictionary with `sample` (a number) and `places` (dictionaries with record, start and end).
        """
