"""What happens between two optimizer steps, in order, on one screen.

exchange (what the ranks know) -> journal -> evaluation -> checkpoint -> stop. All ranks take the same branches:
each depends on the step's number or on what was agreed, never on a rank's own clock or signals.
"""

from __future__ import annotations

import time
from typing import Any

import pytorch_lightning as pl
import torch.distributed as dist

from datamodules.datamodule import SequenceDataModule
from pipeline import checkpoint as checkpoints
from pipeline.agreement import Agreed, Agreement, hash_samples
from pipeline.checkpoint import Manifest
from pipeline.config import RunConfig, as_dict, flatten
from pipeline.distributed import Ranks
from pipeline.environment import versions
from pipeline.evaluate import baselines, evaluate, evaluation_row
from pipeline.module import PretrainModule
from pipeline.preemption import StopRequest
from pipeline.recorder import Recorder
from pipeline.strategy import ZeroStrategy, precision_of
from pipeline.tracking import Mirror


class Boundary(pl.Callback):
    """Runs the pipeline's side of training after each optimizer step. `stopped_early`: left before max_steps."""

    def __init__(
        self,
        config: RunConfig,
        data: SequenceDataModule,
        ranks: Ranks,
        stop: StopRequest,
        mirror: Mirror | None,
    ) -> None:
        self.config = config
        self.data = data
        self.ranks = ranks
        self.stop = stop
        self.stopped_early = False
        self.step = 0
        self._agreement = Agreement(ranks)
        self._main = Recorder(config, ranks.size, mirror) if ranks.rank == 0 else None
        self._saved_at = time.monotonic()
        self._idle_since = 0.0

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.step = trainer.global_step
        if self._main:
            self._main.begin(self.step)

    def on_train_batch_start(
        self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_index: int
    ) -> None:
        if self._main and self._idle_since:
            self._main.waited(time.monotonic() - self._idle_since)

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_index: int
    ) -> None:
        if trainer.global_step != self.step:  # else more micro batches belong to this step
            self._between_steps(trainer)
        self._idle_since = time.monotonic()

    def _between_steps(self, trainer: pl.Trainer) -> None:
        self.step = trainer.global_step
        last = self.step >= self.config.trainer.max_steps
        agreed = self._finish_step(trainer)

        stop = agreed is not None and agreed.stop
        every = self.config.trainer.eval_every_steps
        if last or (every and self.step % every == 0):
            # The last figure is the one that is quoted: over the whole split.
            self._evaluate(trainer, 0 if last else self.config.trainer.eval_sequences)
        every = self.config.checkpoint.every_steps
        due = bool(every) and self.step % every == 0
        if last or stop or due or (agreed is not None and agreed.save):
            self._save(trainer)
        if stop and not last:
            self.stopped_early = True
            trainer.should_stop = True

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        if self._main:
            self._main.close()

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self._main:
            self._main.close()

    def _finish_step(self, trainer: pl.Trainer) -> Agreed | None:
        """Sum the loss over ranks, tell the ranks about this step, write down the one before."""
        module = trainer.lightning_module
        assert isinstance(module, PretrainModule) and module.step_nats is not None
        nats = module.step_nats.float()
        if self.ranks.size > 1:
            dist.all_reduce(nats)
        minutes = self.config.checkpoint.every_minutes
        overdue = bool(minutes) and time.monotonic() - self._saved_at > minutes * 60
        agreed = self._agreement.exchange(
            self.step,
            stop=bool(self.stop),
            save=self.ranks.rank == 0 and overdue,
            samples=hash_samples(module.step_samples),
        )
        if self._main:
            self._main.confirm(agreed)
            self._main.add(self.step, nats, module.step_targets, _gradient_norm(trainer))
            if self.step % self.config.trainer.log_every_steps == 0:
                self._main.flush()
        module.step_nats, module.step_samples = None, []
        return agreed

    def _settle(self) -> None:
        """Complete the journal up to this step: before anything is published that counts on it."""
        agreed = self._agreement.settle()
        if self._main:
            self._main.confirm(agreed)
            self._main.flush()

    def _evaluate(self, trainer: pl.Trainer, most: int) -> None:
        self._settle()
        result = evaluate(trainer, self.data, most)
        if self._main and result is not None:
            self._main.evaluated(
                evaluation_row(self.step, result, baselines(self.config.directory, self.data.index))
            )

    def _save(self, trainer: pl.Trainer) -> None:
        self._settle()
        started = time.monotonic()
        directory = self.config.directory / "checkpoints"
        partial = checkpoints.partial_directory(directory, self.step)
        if self.ranks.rank == 0:
            checkpoints.clean(directory)
        self.ranks.check(None)
        trainer.save_checkpoint(partial, weights_only=False)
        manifest = Manifest(
            step=self.step,
            samples=self.step * self.config.data.global_batch,
            ranks=self.ranks.size,
            stage=self.config.zero.stage,
            precision=precision_of(self.config),
            config=flatten(as_dict(self.config)),
            data=self.data.index.segments.identity,
            versions=versions(),
        )
        path = checkpoints.publish(partial, manifest, self.ranks)
        if self._main:
            checkpoints.prune(directory, self.config.checkpoint.keep)
            self._main.saved(path, time.monotonic() - started)
        self._saved_at = time.monotonic()


def _gradient_norm(trainer: pl.Trainer) -> Any:
    """Global gradient norm of the last step, before clipping: a number or a tensor on the device."""
    strategy = trainer.strategy
    assert isinstance(strategy, ZeroStrategy)
    return strategy.deepspeed_engine.get_global_grad_norm()
