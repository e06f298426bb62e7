"""The task of `megabase train`: predict the next base, or masked ones, in the windows of a shard set."""

from __future__ import annotations

import logging
from functools import cached_property
from typing import TYPE_CHECKING, Any

from megabase.datamodules.batches.visits import Windows
from megabase.datamodules.config import SKIP
from megabase.datamodules.index.shard_index import ShardIndex
from megabase.pipeline.checkpoint.next_start import next_start, unused_changes
from megabase.pipeline.config.schema import RunConfig
from megabase.pipeline.inference.parts import part_names
from megabase.pipeline.plan.batches import batches_of
from megabase.pipeline.ranks import watchdog
from megabase.pipeline.ranks.groups import Group, Groups
from megabase.pipeline.rundir.dataset import write_dataset
from megabase.pipeline.rundir.journal import Row
from megabase.pipeline.rundir.status import FINISHED, read_status
from megabase.pipeline.tracking.mirror import is_complete
from megabase.pipeline.training.check import check
from megabase.pipeline.training.task import Initial, Task, Trial

if TYPE_CHECKING:
    from megabase.datamodules.datamodule import SequenceDataModule
    from megabase.pipeline.training.module import PretrainModule

logger = logging.getLogger(__name__)


class Pretraining(Task):
    """Pretraining on `data.shards`; see Task."""

    command = "train"
    in_bits = True

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        self._windows: Windows | None = None

    def check(self, ranks: int) -> None:
        self._windows = check(self.config, ranks)

    def warning(self, ranks: int) -> str | None:
        assert self._windows is not None
        return batches_of(self.config, ranks, self._windows.plan).warning

    def has_finished(self, ranks: int) -> bool:
        assert self._windows is not None
        return has_finished(self.config, ranks, self._windows.index)

    @cached_property
    def data(self) -> SequenceDataModule:
        from megabase.datamodules.datamodule import SequenceDataModule

        config = self.config
        return SequenceDataModule(config.data, config.run.seed, config.trainer.sequence_ranks)

    @property
    def identity(self) -> str:
        return self.data.identity

    @property
    def alphabet(self) -> str:
        return self.data.index.alphabet.name

    @property
    def has_validation(self) -> bool:
        return self.data.has_validation

    def initial(self, world: Group) -> Initial | None:
        from megabase.pipeline.training.initial import choose_initial

        return choose_initial(self.config, self.alphabet, world)

    def module(self, groups: Groups, initial: Initial | None) -> PretrainModule:
        from megabase.pipeline.training.module import PretrainModule

        part = groups.part(self.config.data.length)
        return PretrainModule(self.config, initial, part=part, log=False)

    def describe_data(self) -> None:
        write_dataset(self.config.directory, self.config.data.shards, self.data.index)

    def measure(self, trial: Trial, step: int) -> tuple[dict[str, float], dict[str, float] | None] | None:
        """Score the windows of every evaluation with recall, and at the end of the run the whole validation split."""
        from megabase.pipeline.inference.scoring import Score, evaluate, measure_recall

        def score(batch: Any) -> Score:
            return Score(**trial.score(batch))

        data, settings = self.data, self.config.trainer
        parts = part_names(self.config.data.length, cases=data.has_case)

        def score_windows(most: int) -> dict[str, float] | None:
            loader = data.some_validation(most)
            assert not isinstance(loader, list)  # evaluations are due only if there is a validation split
            return evaluate(score, loader, trial.device, group=trial.group, stop=trial.stop, parts=parts)

        subset = score_windows(settings.eval_sequences)
        if subset is None:
            return None
        probe = data.recall_probe(settings.eval_recall) if settings.eval_recall else None
        if probe:
            recall = measure_recall(score, probe, trial.device, group=trial.group, stop=trial.stop)
            if recall is None:
                return None
            subset |= recall
        if step < settings.max_steps:
            return subset, None
        all_scored = not 0 < settings.eval_sequences < data.validation_windows
        full = subset if all_scored else score_windows(0)
        return None if full is None else (subset, full)

    def evaluation_row(self, step: int, subset: dict[str, float], full: dict[str, float] | None) -> Row:
        """The row, with Markov models beside it."""
        from megabase.pipeline.training.baselines import baselines, evaluation_row

        watchdog.beat("fitting Markov models", step)
        skip, most = self.config.data.on_error == SKIP, self.config.trainer.eval_sequences
        return evaluation_row(step, subset, full, baselines(self.config.directory, self.data, most, skip))

    def windows_of(self, step: int) -> list[dict[str, Any]]:
        from megabase.pipeline.training.bad_windows import windows_of

        trainer = self.data.trainer
        assert trainer is not None and trainer.train_dataloader is not None
        return windows_of(self.config, trainer.train_dataloader.dataset, step)


def has_finished(config: RunConfig, ranks: int, index: ShardIndex) -> bool:
    """Whether nothing is left to do, in training, in the status and in MLflow; then it is logged. Starts nothing.

    If this is not certain, ranks are started, and they decide it again (`resume.is_finished`).
    """
    if read_status(config.directory)[0] != FINISHED:
        return False
    if config.tracking.enabled and not is_complete(config):
        return False
    start = next_start(config, ranks, index)
    if start.finished:
        logger.info(
            f"{config.run.name} is finished at step {start.step} (trainer.max_steps={config.trainer.max_steps}):"
            f" nothing is left to do in {config.directory}; a larger trainer.max_steps trains it further"
        )
        if start.changes:
            logger.info(unused_changes(start.changes))
    return start.finished
