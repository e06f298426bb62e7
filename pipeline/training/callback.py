"""What happens between two optimizer steps, in order, on one screen.

exchange (what the ranks know) -> journal -> checkpoint -> evaluation -> stop. All ranks take the same branches:
each depends on the step's number or on what was agreed, never on a rank's own clock or signals. An evaluation may
be broken off to stop in time; the checkpoint is there already, and the next start makes up for it.
"""

from __future__ import annotations

import time
from typing import Any

import pytorch_lightning as pl

from megabase.datamodules.config import SKIP
from megabase.datamodules.datamodule import SequenceDataModule
from megabase.pipeline.checkpoint.saver import Saver
from megabase.pipeline.config.schema import RunConfig
from megabase.pipeline.errors import RunError
from megabase.pipeline.ranks import watchdog
from megabase.pipeline.ranks.agreement import Agreed, Agreement, hash_samples
from megabase.pipeline.ranks.groups import Groups
from megabase.pipeline.ranks.stop import StopRequest
from megabase.pipeline.rundir.journal import has_evaluation
from megabase.pipeline.rundir.paths import RunPaths
from megabase.pipeline.tracking.mirror import Mirror
from megabase.pipeline.training.bad_windows import report
from megabase.pipeline.training.evaluate import baselines, evaluate, evaluation_row
from megabase.pipeline.training.guard import Trouble
from megabase.pipeline.training.module import PretrainModule
from megabase.pipeline.training.recorder import Recorder
from megabase.pipeline.zero.strategy import ZeroStrategy
from megabase.pipeline.zero.timeouts import set_collective_timeouts


class Boundary(pl.Callback):
    """Runs the pipeline's side of training after each optimizer step. `stopped_early`: left before max_steps."""

    def __init__(
        self,
        config: RunConfig,
        data: SequenceDataModule,
        groups: Groups,
        stop: StopRequest,
        mirror: Mirror | None,
    ) -> None:
        self.config = config
        self.data = data
        self.groups = groups
        self.ranks = ranks = groups.world
        self.stop = stop
        self.stopped_early = False
        self.step = 0
        self._agreement = Agreement(ranks)
        self._main = Recorder(config, ranks.size, mirror) if ranks.rank == 0 else None
        self._saved_at = time.monotonic()
        self._idle_since = 0.0

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        assert isinstance(trainer.strategy, ZeroStrategy)
        self._saver = Saver(
            self.config,
            self.ranks,
            trainer.strategy.storage,
            data=self.data.identity,
            alphabet=self.data.index.alphabet.name,
        )
        self.step = trainer.global_step
        self._open_books()
        set_collective_timeouts(self.config.trainer.hang_minutes)
        if any(self.ranks.gather(bool(self.stop))):  # told while starting: what is on disk is all there is
            self._say_why()
            self.stopped_early = trainer.should_stop = True
            return
        if self._main:
            self.stop.watch(RunPaths(self.config.directory).stop)
        if self.step and self._evaluation_due() and not self._has_evaluation():
            self.stopped_early = not self._evaluate(trainer)
        if self.stopped_early:
            self._say_why()
        # Not before: a limit that is shorter than the start-up must leave room for a step.
        self.stop.minutes = self.config.trainer.max_minutes
        if self.stopped_early or self.step >= self.config.trainer.max_steps:
            trainer.should_stop = True

    def _open_books(self) -> None:
        """On rank 0, begin to write; all ranks hear if that cannot be."""
        error = None
        if self._main:
            try:
                self._main.begin(self.step)
            except OSError as caught:
                error = f"cannot write in {self.config.directory}: {caught}"
        self.ranks.check(error)

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
        watchdog.beat("training", self.step)
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
        if stop:
            self._say_why()
        if self._saver.pending and any(agreed and agreed.progress > self._saver.advanced for agreed in heard):
            self._advance()
        if save:
            self._save(trainer, final=stop or last)
        complete = not evaluation or self._evaluate(trainer)
        if not complete:
            if not stop:
                self._say_why()
            self._publish()
            if not save:
                self._save(trainer, final=True)

        if stop or not complete:
            self.stopped_early = not (last and complete)
        if stop or last or not complete:
            trainer.should_stop = True

    def _say_why(self) -> None:
        if self._main:
            self._main.say(f"stopping: {self.stop.reason or 'another rank was told to'}")

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        if self._main:
            self._main.close()

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self._main:
            self._main.close()

    def _finish_step(self, trainer: pl.Trainer) -> Agreed | None:
        """Sum the loss over ranks, tell the ranks about this step, write down the one before."""
        module, strategy = trainer.lightning_module, trainer.strategy
        assert isinstance(module, PretrainModule) and isinstance(strategy, ZeroStrategy)
        nats, scored = module.totals()
        applied = strategy.step_was_applied()
        minutes = self.config.checkpoint.every_minutes
        overdue = bool(minutes) and time.monotonic() - self._saved_at > minutes * 60
        agreed = self._agreement.exchange(
            self.step,
            stop=bool(self.stop),
            save=self.ranks.rank == 0 and overdue,
            progress=self._saver.progress,
            samples=hash_samples(module.step_samples),
            trouble=self._main is not None and self._main.trouble is not None,
        )
        if self._main:
            self._main.confirm(agreed)
            self._main.add(self.step, nats, scored, module.step_targets, _gradient_norm(trainer), applied)
            if self.step % self.config.trainer.log_every_steps == 0:
                self._main.flush()
        skipped = module.guard.finish(self.step, module.micro_nats, applied)
        module.next_step()
        if module.guard.skips and not applied and (skipped := self.ranks.broadcast(skipped)):
            windows = self._report(Trouble(self.step, skipped))
            if self._main:
                self._main.say(f"{skipped}: its update is skipped; {windows}")
        if agreed and agreed.trouble:
            self._settle()  # which says what it is
        return agreed

    def _settle(self) -> Agreed | None:
        """Complete the journal up to this step, and learn now what was agreed about it.

        Before anything is published that counts on the journal. Numbers that are bad end the run here: on every
        rank, and before a poisoned checkpoint could push out a good one.
        """
        agreed = self._agreement.settle()
        trouble = None
        if self._main:
            self._main.confirm(agreed)
            self._main.flush()
            trouble = self._main.trouble
        if trouble := self.ranks.broadcast(trouble):
            raise RunError(
                f"{trouble.text}: stopped before a checkpoint of it was written; {self._report(trouble)}. The same"
                " command goes on from the last good checkpoint, or begins where there is none, and comes to the same"
                f" numbers: {trouble.way_out}"
            )
        return agreed

    def _report(self, trouble: Trouble) -> str:
        """What is known of the windows of a bad step, also written to a file; all ranks call it."""
        trainer = self.data.trainer
        assert trainer is not None and trainer.train_dataloader is not None
        module = trainer.lightning_module
        assert isinstance(module, PretrainModule)
        nats = module.guard.micro_nats(trouble.step)
        return report(self.config, trouble, self.groups.data, nats, trainer.train_dataloader.dataset)

    def _evaluation_due(self) -> bool:
        every = self.config.trainer.eval_every_steps
        last = self.step >= self.config.trainer.max_steps
        return self.data.has_validation and (last or (bool(every) and self.step % every == 0))

    def _has_evaluation(self) -> bool:
        journal = RunPaths(self.config.directory).metrics
        return bool(self.ranks.broadcast(self.ranks.rank == 0 and has_evaluation(journal, self.step)))

    def _evaluate(self, trainer: pl.Trainer) -> bool:
        """Evaluate and write the row; whether that was finished, or broken off because ranks agreed to stop."""
        asking = Agreement(self.ranks)
        asked, stopped = 0, False

        def stop() -> bool:
            nonlocal asked, stopped
            asked += 1
            watchdog.beat("evaluating", self.step)
            agreed = asking.exchange(asked, stop=bool(self.stop), save=False, progress=0, samples=0)
            stopped = agreed is not None and agreed.stop
            return stopped

        # The last figure is the one that is quoted: over the whole split.
        last = self.step >= self.config.trainer.max_steps
        result = evaluate(trainer, self.data, 0 if last else self.config.trainer.eval_sequences, stop)
        asking.settle()
        if self._main and result is not None:
            watchdog.beat("fitting Markov models", self.step)
            skip = self.config.data.on_error == SKIP
            ladder = baselines(self.config.directory, self.data.index, skip)
            self._main.evaluated(evaluation_row(self.step, result, ladder))
        return not stopped

    def _save(self, trainer: pl.Trainer, *, final: bool) -> None:
        """Write a checkpoint of this step, or begin to; the one with which a run ends is there on return."""
        self._publish()
        watchdog.beat("writing a checkpoint", self.step)
        self._saver.begin(trainer, self.step, must=final)
        self._saved_at = time.monotonic()
        if final or not self.config.checkpoint.background:
            self._publish()
        if self._main:
            self._main.held()

    def _publish(self) -> None:
        """Publish the checkpoint that is being written, if there is one; waits for the slowest rank."""
        while self._saver.pending:
            self._advance()

    def _advance(self) -> None:
        """Do the next thing for the checkpoint that is being written."""
        watchdog.beat("publishing a checkpoint", self.step)
        saved = self._saver.advance()
        watchdog.beat("training", self.step)
        if self._main and saved:
            self._main.saved(saved)


def _gradient_norm(trainer: pl.Trainer) -> Any:
    """Global gradient norm of the last step, before clipping: a number or a tensor on the device."""
    strategy = trainer.strategy
    assert isinstance(strategy, ZeroStrategy)
    return strategy.gradient_norm()
