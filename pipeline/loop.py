"""What happens between two optimizer steps, in order, on one screen.

exchange (what the ranks know) -> journal -> checkpoint -> evaluation -> stop. All ranks take the same branches:
each depends on the step's number or on what was agreed, never on a rank's own clock or signals. An evaluation may
be broken off to stop in time; the checkpoint is there already, and the next start makes up for it.
"""

from __future__ import annotations

import time
from typing import Any

import pytorch_lightning as pl
import torch.distributed as dist

from datamodules.config import SKIP
from datamodules.datamodule import SequenceDataModule
from pipeline import checkpoint as checkpoints
from pipeline.agreement import Agreed, Agreement, hash_samples
from pipeline.checkpoint import manifest_of
from pipeline.config import RunConfig
from pipeline.distributed import Ranks
from pipeline.errors import RunError
from pipeline.evaluate import baselines, evaluate, evaluation_row
from pipeline.journal import has_evaluation
from pipeline.module import PretrainModule
from pipeline.preemption import StopRequest
from pipeline.recorder import Recorder
from pipeline.strategy import ZeroStrategy
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
        if self.step and self._evaluation_due() and not self._has_evaluation():
            self.stopped_early = not self._evaluate(trainer)
        if self.stopped_early or self.step >= self.config.trainer.max_steps:
            trainer.should_stop = True

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
        every = self.config.checkpoint.every_steps
        save = last or (bool(every) and self.step % every == 0)
        evaluation = self._evaluation_due()

        heard = [self._finish_step(trainer)]
        if save or evaluation or any(agreed and (agreed.stop or agreed.save) for agreed in heard):
            heard.append(self._settle())
        stop = any(agreed and agreed.stop for agreed in heard)
        save = save or stop or any(agreed and agreed.save for agreed in heard)
        if save:
            self._save(trainer)
        complete = not evaluation or self._evaluate(trainer)
        if not complete and not save:
            self._save(trainer)

        if stop or not complete:
            if self._main:
                self._main.say(f"stopping: {self.stop.reason or 'another rank was told to'}")
            self.stopped_early = not (last and complete)
        if stop or last or not complete:
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
        nats, scored = module.step_nats.float(), module.step_scored
        if self.ranks.size > 1:
            dist.all_reduce(nats)
            if scored is not None:
                dist.all_reduce(scored)
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
            self._main.add(self.step, nats, scored, module.step_targets, _gradient_norm(trainer))
            if self.step % self.config.trainer.log_every_steps == 0:
                self._main.flush()
        module.step_nats, module.step_scored, module.step_samples = None, None, []
        return agreed

    def _settle(self) -> Agreed | None:
        """Complete the journal up to this step, and learn now what was agreed about it.

        Before anything is published that counts on the journal. A loss that is not finite ends the run here: on
        every rank, and before a poisoned checkpoint could push out a good one.
        """
        agreed = self._agreement.settle()
        trouble = None
        if self._main:
            self._main.confirm(agreed)
            self._main.flush()
            trouble = self._main.trouble
        if trouble := self.ranks.broadcast(trouble):
            raise RunError(
                f"{trouble}: stopped before a checkpoint of it was written. The same command goes on from the last"
                " good one; a lower optim.lr or optim.clip may help"
            )
        return agreed

    def _evaluation_due(self) -> bool:
        every = self.config.trainer.eval_every_steps
        last = self.step >= self.config.trainer.max_steps
        return self.data.has_validation and (last or (bool(every) and self.step % every == 0))

    def _has_evaluation(self) -> bool:
        journal = self.config.directory / "metrics.jsonl"
        return bool(self.ranks.broadcast(self.ranks.rank == 0 and has_evaluation(journal, self.step)))

    def _evaluate(self, trainer: pl.Trainer) -> bool:
        """Evaluate and write the row; whether that was finished, or broken off because ranks agreed to stop."""
        asking = Agreement(self.ranks)
        asked, stopped = 0, False

        def stop() -> bool:
            nonlocal asked, stopped
            asked += 1
            agreed = asking.exchange(asked, stop=bool(self.stop), save=False, samples=0)
            stopped = agreed is not None and agreed.stop
            return stopped

        # The last figure is the one that is quoted: over the whole split.
        last = self.step >= self.config.trainer.max_steps
        result = evaluate(trainer, self.data, 0 if last else self.config.trainer.eval_sequences, stop)
        asking.settle()
        if self._main and result is not None:
            skip = self.config.data.on_error == SKIP
            ladder = baselines(self.config.directory, self.data.index, skip)
            self._main.evaluated(evaluation_row(self.step, result, ladder))
        return not stopped

    def _save(self, trainer: pl.Trainer) -> None:
        started = time.monotonic()
        directory = self.config.directory / "checkpoints"
        partial = checkpoints.partial_directory(directory, self.step)
        if self.ranks.rank == 0:
            checkpoints.clean(directory)
        self.ranks.check(None)  # nobody writes before that is done
        trainer.save_checkpoint(partial, weights_only=False)
        manifest = manifest_of(self.config, self.step, self.ranks.size, self.data.identity)
        path = checkpoints.publish(partial, manifest, self.ranks)
        if self._main:
            checkpoints.prune(directory, self.config.checkpoint.keep)
            self._main.saved(self.step, path, time.monotonic() - started)
        self._saved_at = time.monotonic()


def _gradient_norm(trainer: pl.Trainer) -> Any:
    """Global gradient norm of the last step, before clipping: a number or a tensor on the device."""
    strategy = trainer.strategy
    assert isinstance(strategy, ZeroStrategy)
    return strategy.deepspeed_engine.get_global_grad_norm()
