"""Evaluations during training: all ranks score their shares of the validation windows through DeepSpeed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import pytorch_lightning as pl
import torch

from megabase.datamodules.batches.collate import Batch
from megabase.datamodules.datamodule import SequenceDataModule
from megabase.models.attention.statistics import LSHStatistics, lsh_statistics
from megabase.pipeline.config.schema import RunConfig
from megabase.pipeline.hardware import peak_memory
from megabase.pipeline.inference.parts import part_names
from megabase.pipeline.inference.scoring import Score, evaluate, measure_recall
from megabase.pipeline.ranks import watchdog
from megabase.pipeline.ranks.agreement import Agreement
from megabase.pipeline.ranks.groups import Groups
from megabase.pipeline.ranks.stop import StopRequest
from megabase.pipeline.rundir.journal import Row
from megabase.pipeline.zero.strategy import ZeroStrategy


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        subset: of the windows of every evaluation, with recall (see `scoring.evaluate` and `measure_recall`).
        full: of the whole validation split, at the end of the run; None before.
        hashing: statistics of every LSH layer in the first batch of rank 0, by the number of the layer; empty on the
            other ranks.
        update_ratio: see `ZeroStrategy.update_ratio`.
        memory: peak memory of every rank so far, bytes.
    """

    subset: dict[str, float]
    full: dict[str, float] | None
    hashing: dict[int, LSHStatistics]
    update_ratio: float | None
    memory: list[int]

    @property
    def measured(self) -> Row:
        """What depends on the ranks' layout, for performance.jsonl.

        Returns:
            rank_memory_bytes_most and rank_memory_bytes_least, the ranks' peaks so far; update_ratio; and for each LSH
            layer lsh_LAYER_balance, lsh_LAYER_unmatched, lsh_LAYER_truncated and lsh_LAYER_mass_ROUND of each round,
            counted from 0 (see `LSHStatistics`), without what the layer's rule does not have.
        """
        row: Row = {"rank_memory_bytes_most": max(self.memory), "rank_memory_bytes_least": min(self.memory)}
        if self.update_ratio is not None:
            row["update_ratio"] = self.update_ratio
        for layer, found in self.hashing.items():
            row[f"lsh_{layer}_balance"] = found.balance
            if found.mass is not None:
                row |= {f"lsh_{layer}_unmatched": found.unmatched, f"lsh_{layer}_truncated": found.truncated}
                row |= {f"lsh_{layer}_mass_{number}": share for number, share in enumerate(found.mass)}
        return row


class Evaluator:
    """Evaluates the model of a run between two optimizer steps. All ranks call `run`.

    Args:
        config: of the run.
        data: the run's windows.
        groups: of ranks.
        stop: set when this rank is asked to stop.
    """

    def __init__(
        self, config: RunConfig, data: SequenceDataModule, groups: Groups, stop: StopRequest
    ) -> None:
        self._config = config
        self._data = data
        self._groups = groups
        self._stop = stop

    def run(self, trainer: pl.Trainer, step: int) -> Evaluation | None:
        """Evaluate the model after `step`; None if the ranks agreed to stop before it was finished."""
        strategy, module = trainer.strategy, trainer.lightning_module
        agreement = Agreement(self._groups.world)
        hashing: dict[int, LSHStatistics] = {}
        batches = 0

        def stop() -> bool:
            nonlocal batches
            batches += 1
            watchdog.beat("evaluating", step)
            agreed = agreement.exchange(batches, stop=bool(self._stop), save=False, progress=0, samples=0)
            return agreed is not None and agreed.stop

        def score(batch: Batch) -> Score:
            moved = strategy.batch_to_device(trainer.precision_plugin.convert_input(batch))
            measures = batches == 1 and self._groups.world.rank == 0  # only rank 0 records them
            with lsh_statistics(module) if measures else nullcontext(hashing) as found:
                sums = strategy.validation_step(moved, batches)
            hashing.update(found)
            assert isinstance(sums, dict)
            return Score(**sums)

        module.eval()
        results = self._measure(score, stop, strategy.root_device, step)
        module.train()
        agreement.settle()
        assert isinstance(strategy, ZeroStrategy)
        if results is None:
            return None
        memory = self._groups.world.gather(peak_memory())
        return Evaluation(*results, hashing, strategy.update_ratio(), memory)

    def _measure(
        self, score: Callable[[Batch], Score], stop: Callable[[], bool], device: torch.device, step: int
    ) -> tuple[dict[str, float], dict[str, float] | None] | None:
        """Score the windows of every evaluation with recall, and at the end of the run the whole validation split.

        Args:
            score, stop, device: see `scoring.evaluate`.
            step: of the optimizer.

        Returns:
            Both results. The second is None before the end of the run. None if `stop` ended the evaluation.
        """
        group, settings = self._groups.data.handle, self._config.trainer
        parts = part_names(self._config.data.length, cases=self._data.has_case)

        def score_windows(most: int) -> dict[str, float] | None:
            loader = self._data.some_validation(most)
            assert not isinstance(loader, list)  # evaluations are due only if there is a validation split
            return evaluate(score, loader, device, group=group, stop=stop, parts=parts)

        subset = score_windows(settings.eval_sequences)
        if subset is None:
            return None
        probe = self._data.recall_probe(settings.eval_recall) if settings.eval_recall else None
        if probe:
            recall = measure_recall(score, probe, device, group=group, stop=stop)
            if recall is None:
                return None
            subset |= recall
        if step < settings.max_steps:
            return subset, None
        all_scored = not 0 < settings.eval_sequences < self._data.validation_windows
        full = subset if all_scored else score_windows(0)
        return None if full is None else (subset, full)
