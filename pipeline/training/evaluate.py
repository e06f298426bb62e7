"""Evaluations during training: all ranks score their shares of the validation windows through DeepSpeed."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
from torch import Tensor

from megabase.models.attention.statistics import LSHStatistics, lsh_statistics
from megabase.pipeline.hardware import peak_memory
from megabase.pipeline.ranks import watchdog
from megabase.pipeline.ranks.agreement import Agreement
from megabase.pipeline.ranks.groups import Groups
from megabase.pipeline.ranks.stop import StopRequest
from megabase.pipeline.rundir.journal import Row
from megabase.pipeline.training.task import Task, Trial
from megabase.pipeline.zero.strategy import ZeroStrategy


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        subset, full: see `Task.measure`.
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
        task: what the run trains.
        groups: of ranks.
        stop: set when this rank is asked to stop.
    """

    def __init__(self, task: Task, groups: Groups, stop: StopRequest) -> None:
        self._task = task
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

        def score(batch: Any) -> dict[str, Tensor]:
            moved = strategy.batch_to_device(trainer.precision_plugin.convert_input(batch))
            measures = batches == 1 and self._groups.world.rank == 0  # only rank 0 records them
            with lsh_statistics(module) if measures else nullcontext(hashing) as found:
                sums = strategy.validation_step(moved, batches)
            hashing.update(found)
            assert isinstance(sums, dict)
            return sums

        module.eval()
        trial = Trial(score, stop, strategy.root_device, self._groups.world.handle)
        results = self._task.measure(trial, step)
        module.train()
        agreement.settle()
        assert isinstance(strategy, ZeroStrategy)
        if results is None:
            return None
        memory = self._groups.world.gather(peak_memory())
        return Evaluation(*results, hashing, strategy.update_ratio(), memory)
