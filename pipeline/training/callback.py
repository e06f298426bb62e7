"""What the pipeline does between two optimizer steps, as a Lightning callback.

In order: the ranks exchange what they know, rank 0 writes the journal, `decide.py` decides, and the decision is
carried out: checkpoint, evaluation, stop. All ranks take the same branches, because each depends on the number of the
step or on what was agreed, never on a rank's own clock or signals.
"""

from __future__ import annotations

import time
from typing import Any

import pytorch_lightning as pl
import torch

from megabase.pipeline.checkpoint.saver import Saver
from megabase.pipeline.errors import RunError
from megabase.pipeline.ranks import watchdog
from megabase.pipeline.ranks.agreement import Agreed, Agreement, hash_samples
from megabase.pipeline.ranks.groups import Groups
from megabase.pipeline.ranks.stop import StopRequest
from megabase.pipeline.rundir.hint import resume_hint
from megabase.pipeline.rundir.journal import has_evaluation
from megabase.pipeline.rundir.paths import RunPaths
from megabase.pipeline.tracking.mirror import Mirror
from megabase.pipeline.training.bad_windows import report
from megabase.pipeline.training.decide import (
    Decision,
    Due,
    decide,
    decide_after_broken_evaluation,
    due_at,
    must_settle,
    must_write,
    situation_of,
)
from megabase.pipeline.training.evaluate import Evaluator
from megabase.pipeline.training.guard import Trouble
from megabase.pipeline.training.module import PretrainModule
from megabase.pipeline.training.recorder import FinishedStep, Recorder
from megabase.pipeline.training.task import Task
from megabase.pipeline.zero.strategy import ZeroStrategy
from megabase.pipeline.zero.timeouts import set_collective_timeouts


class TrainingCallback(pl.Callback):
    """Journal, checkpoints, evaluation and stopping of a run.

    Args:
        task: what the run trains.
        groups: of ranks.
        stop: set when this rank is asked to stop.
        mirror: of rank 0, if the run is tracked.

    Attributes:
        step: optimizer steps done.
        stopped_early: training has stopped before the run is finished.
    """

    def __init__(
        self,
        task: Task,
        groups: Groups,
        stop: StopRequest,
        mirror: Mirror | None,
    ) -> None:
        self.step = 0
        self.stopped_early = False
        self._config = config = task.config
        self._paths = RunPaths(config.directory)
        self._task = task
        self._groups = groups
        self._world = groups.world
        self._stop = stop
        self._agreement = Agreement(groups.world)
        self._evaluator = Evaluator(task, groups, stop)
        # Only rank 0 writes the journal and prints.
        self._recorder: Recorder | None = None
        if groups.world.rank == 0:
            self._recorder = Recorder(config, groups.world.size, mirror, in_bits=task.in_bits)
        self._saved_at = time.monotonic()
        self._idle_since = 0.0

    # -- Lightning's hooks

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Open the journal; run the evaluation that the previous start did not finish, if there is one."""
        assert isinstance(trainer.strategy, ZeroStrategy)
        self._saver = Saver(
            self._config,
            self._world,
            trainer.strategy.storage,
            data=self._task.identity,
            alphabet=self._task.alphabet,
        )
        self.step = trainer.global_step
        self._open_journal()
        set_collective_timeouts(self._config.trainer.hang_minutes)
        if trainer.should_stop:
            self._stop_for_callback(trainer)
        if any(self._world.gather(bool(self._stop))):
            # A stop was requested during start-up. There is nothing to save, because training has not begun.
            self._end(trainer, stopped_early=True, report_stop=True)
            return
        if self._recorder:
            self._stop.watch(self._paths.stop)
        if self._lacks_evaluation() and not self._evaluate(trainer):
            self._end(trainer, stopped_early=True, report_stop=True)
        elif self.step >= self._config.trainer.max_steps:
            self._end(trainer, stopped_early=False)
        # Set only now, so that even with a limit shorter than the start-up at least one step is trained.
        self._stop.minutes = self._config.trainer.max_minutes

    def on_train_batch_start(
        self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_index: int
    ) -> None:
        """Measure how long training has waited for the batch."""
        if self._recorder and self._idle_since:
            self._recorder.add_waiting(time.monotonic() - self._idle_since)

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_index: int
    ) -> None:
        """After the last micro batch of an optimizer step, do what is due between two steps."""
        if trainer.should_stop:
            self._stop_for_callback(trainer)
        if trainer.global_step != self.step:
            self.step = trainer.global_step
            self._between_steps(trainer)
            if self._recorder and (loss := self._recorder.last_loss) is not None:
                self._show_metrics(trainer, {"train/loss": loss})
        elif self._recorder:
            assert isinstance(module, PretrainModule)
            self._recorder.within(self.step + 1, len(module.micro_nats), trainer.accumulate_grad_batches)
        watchdog.beat("training", self.step)
        self._idle_since = time.monotonic()

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        """Close the journal."""
        if self._recorder:
            self._recorder.close()

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Close the journal."""
        if self._recorder:
            self._recorder.close()

    def _stop_for_callback(self, trainer: pl.Trainer) -> None:
        """A user's callback, which runs before this one, wants to stop: leave a STOP file, and stop as at one."""
        trainer.should_stop = False
        self._stop.reason = self._stop.reason or "a callback of trainer.callbacks set trainer.should_stop"
        self._stop.by_person = True
        self._paths.stop.touch()

    # -- between two optimizer steps

    def _between_steps(self, trainer: pl.Trainer) -> None:
        due = due_at(self.step, self._config, self._task.has_validation)
        situation = situation_of(
            due, self._agree(trainer, due), self._saver.advanced if self._saver.pending else None
        )
        decision = decide(situation)
        self._carry_out(decision, trainer)
        if decision.evaluate and not self._evaluate(trainer):
            self._publish()
            published = self._saver.published == self.step
            self._carry_out(decide_after_broken_evaluation(situation, published), trainer)

    def _carry_out(self, decision: Decision, trainer: pl.Trainer) -> None:
        """Carry out a decision, except for its evaluation."""
        if decision.report_stop:
            self._report_stop()
        if decision.advance:
            self._advance()
        if decision.save:
            self._save(trainer, final=decision.final)
        if decision.end:
            self._end(trainer, stopped_early=decision.stopped_early)

    def _end(self, trainer: pl.Trainer, *, stopped_early: bool, report_stop: bool = False) -> None:
        """Tell Lightning to stop training."""
        if report_stop:
            self._report_stop()
        self.stopped_early = stopped_early
        trainer.should_stop = True

    def _report_stop(self) -> None:
        if self._recorder:
            self._recorder.print(f"stopping: {self._stop.reason or 'another rank received a stop request'}")

    # -- what the ranks know

    def _agree(self, trainer: pl.Trainer, due: Due) -> list[Agreed | None]:
        """Exchange what this rank knows of the step; returns what the ranks have agreed on by now."""
        agreed = [self._finish_step(trainer)]
        if must_settle(due, agreed[0]):
            agreed.append(self._settle())
        return agreed

    def _finish_step(self, trainer: pl.Trainer) -> Agreed | None:
        """Sum the loss over ranks, send this rank's part of the agreement, note the step for the journal.

        Returns:
            What the ranks agreed about the step before.
        """
        module, strategy = trainer.lightning_module, trainer.strategy
        assert isinstance(module, PretrainModule) and isinstance(strategy, ZeroStrategy)
        nats, weights = module.totals()
        applied = strategy.step_was_applied()
        recorder = self._recorder
        agreed = self._agreement.exchange(
            self.step,
            stop=bool(self._stop),
            save=recorder is not None and self._save_is_overdue(),
            progress=self._saver.progress,
            samples=hash_samples(module.step_samples) if self._groups.holds_start else 0,
            trouble=recorder is not None and recorder.trouble is not None,
        )
        if recorder:
            recorder.add_samples(agreed)
            norm = strategy.gradient_norm()
            recorder.add(FinishedStep(self.step, nats, weights, module.step_targets, norm, applied))
            if must_write(agreed, self._config.trainer.log_every_steps):
                recorder.flush()
        reason = module.guard.finish(self.step, module.micro_nats, applied)
        module.next_step()
        if module.guard.skips and not applied:
            self._report_skip(self._world.broadcast(reason))
        if agreed and agreed.trouble:
            self._settle()  # raises
        return agreed

    def _save_is_overdue(self) -> bool:
        minutes = self._config.checkpoint.every_minutes
        return bool(minutes) and time.monotonic() - self._saved_at > minutes * 60

    def _settle(self) -> Agreed | None:
        """Complete the journal up to this step; returns what the ranks agreed about it.

        Called before anything is published that depends on the journal.

        Raises:
            RunError: on every rank, if rank 0 found bad numbers. A checkpoint with them must not replace a good one.
        """
        agreed = self._agreement.settle()
        trouble = None
        if self._recorder:
            self._recorder.add_samples(agreed)
            self._recorder.flush()
            trouble = self._recorder.trouble
        if trouble := self._world.broadcast(trouble):
            raise RunError(
                f"{trouble.text}: stopped before a checkpoint of it was written; {self._report_windows(trouble)};"
                f" {resume_hint(self._config.directory)}, and it meets the same numbers unless a setting is changed:"
                f" {trouble.way_out}"
            )
        return agreed

    def _report_skip(self, reason: str) -> None:
        """Print why the update of this step was skipped, if it was (`reason` is not empty). All ranks call it."""
        if reason:
            windows = self._report_windows(Trouble(self.step, reason))
            if self._recorder:
                self._recorder.print(f"{reason}: its update is skipped; {windows}")

    def _report_windows(self, trouble: Trouble) -> str:
        """Write the windows of a bad step to a file; returns what to print about them. All ranks call it."""
        trainer = self._task.data.trainer
        assert trainer is not None
        module = trainer.lightning_module
        assert isinstance(module, PretrainModule)
        nats = module.guard.micro_nats(trouble.step)
        return report(self._config, trouble, self._groups, nats, self._task.windows_of)

    # -- journal, evaluation, checkpoints

    def _open_journal(self) -> None:
        """On rank 0, open the journal. Raises RunError on every rank if that fails."""
        error = None
        if self._recorder:
            try:
                self._recorder.open(self.step)
            except OSError as caught:
                error = f"cannot write in {self._config.directory}: {caught}"
        self._world.check(error)

    def _lacks_evaluation(self) -> bool:
        """Whether an evaluation is due at the step that training resumed from, and the journal has none."""
        if not self.step or not due_at(self.step, self._config, self._task.has_validation).evaluation:
            return False
        found = self._recorder is not None and has_evaluation(self._paths.metrics, self.step)
        return not self._world.broadcast(found)

    def _evaluate(self, trainer: pl.Trainer) -> bool:
        """Evaluate and write the row; false if the ranks agreed to stop before it was finished."""
        found = self._evaluator.run(trainer, self.step)
        if found is None:
            return False
        if self._recorder:
            row = self._task.evaluation_row(self.step, found.subset, found.full)
            self._recorder.add_evaluation(row, found.measured)
        shown = ("valid_loss", "valid_bits_per_base")
        self._show_metrics(
            trainer, {name.replace("_", "/", 1): found.subset[name] for name in shown if name in found.subset}
        )
        ending = trainer.should_stop  # the run ends after this evaluation
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if callback is not self:
                callback.on_validation_end(trainer, trainer.lightning_module)
        if trainer.should_stop and not ending:
            self._stop_for_callback(trainer)
        return True

    def _show_metrics(self, trainer: pl.Trainer, metrics: dict[str, float]) -> None:
        """Show metrics to the user's callbacks, if there are any, under the names that `PretrainModule` logs."""
        if len(trainer.callbacks) == 1:  # type: ignore[attr-defined]
            return
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})

    def _save(self, trainer: pl.Trainer, *, final: bool) -> None:
        """Write a checkpoint of this step. With `checkpoint.background` only begin it, unless it is final."""
        self._publish()
        watchdog.beat("writing a checkpoint", self.step)
        self._saver.begin(trainer, self.step, must=final)
        self._saved_at = time.monotonic()
        if final or not self._config.checkpoint.background:
            self._publish()
        if self._recorder:
            self._recorder.restart_speed()

    def _publish(self) -> None:
        """Wait until the checkpoint that is being written is published, if there is one."""
        while self._saver.pending:
            self._advance()

    def _advance(self) -> None:
        """Do the next part of the checkpoint that is being written."""
        watchdog.beat("publishing a checkpoint", self.step)
        saved = self._saver.advance()
        watchdog.beat("training", self.step)
        if self._recorder and saved:
            self._recorder.add_checkpoint(saved)
