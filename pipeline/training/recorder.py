"""What rank 0 records and shows while a run trains: journal, speed, progress, loss curve."""

from __future__ import annotations

import logging
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import torch

from megabase.pipeline.checkpoint.saver import Saved
from megabase.pipeline.config.schema import SKIP, RunConfig
from megabase.pipeline.errors import first_line
from megabase.pipeline.inference.scoring import bits
from megabase.pipeline.ranks.agreement import Agreed
from megabase.pipeline.rundir.figures import Figures, measures, recall
from megabase.pipeline.rundir.journal import Journal, Row, read
from megabase.pipeline.rundir.paths import RunPaths
from megabase.pipeline.tracking.mirror import Mirror
from megabase.pipeline.training.guard import History, Trouble, step_loss
from megabase.pipeline.training.module import learning_rate
from megabase.pipeline.training.plots import loss_curve
from megabase.pipeline.training.progress import Display
from megabase.pipeline.training.speed import Speed

logger = logging.getLogger(__name__)


@dataclass
class FinishedStep:
    """An optimizer step whose row of the journal is not written yet. Tensors stay on the device until it is.

    Attributes:
        step: number of the step, from 1.
        nats: sum over all ranks and micro batches.
        weights: see `guard.step_loss`.
        targets: number of labels in the global batch.
        grad_norm: global norm of the gradients before clipping: a number, a tensor, or None if it is not known.
        applied: whether DeepSpeed made the update. It skips one whose gradients are not finite.
        samples: hash of the samples that all ranks consumed (`hash_samples`); None until the ranks have agreed on it.
        time: at which this process had done the step, in seconds since 1970.
    """

    step: int
    nats: torch.Tensor
    weights: torch.Tensor | None
    targets: float
    grad_norm: Any
    applied: bool = True
    samples: int | None = None
    time: float = field(default_factory=time.time)


class Recorder:
    """Writes the journal and shows progress. For rank 0.

    Args:
        config: of the run.
        ranks: number of ranks, for the speed of each device.
        mirror: started once the journal is open; None: the run is not tracked.
        in_bits: the loss is that of predicting bases, so it is written in bits per base as well.

    Attributes:
        last_loss: nats per base of the last row that this start has written; None before there is one.
        trouble: why training must end before another checkpoint is published; None if nothing is wrong.
    """

    def __init__(self, config: RunConfig, ranks: int, mirror: Mirror | None, *, in_bits: bool = True) -> None:
        self.trouble: Trouble | None = None
        self.last_loss: float | None = None
        self._config = config
        self._paths = RunPaths(config.directory)
        self._mirror = mirror
        self._in_bits = in_bits
        self._skips = config.guard.on_bad == SKIP
        self._history = History(config)
        self._speed = Speed(config, ranks)
        self._unwritten: list[FinishedStep] = []
        self._figures = Figures(config.trainer.max_steps)
        self._progress: Display | None = None
        self._journal: Journal | None = None
        self._performance: Journal | None = None
        self._drawn = False  # the loss curve has all rows

    def open(self, step: int) -> None:
        """Open the journals at `step`. Later rows are dropped: training computes them again."""
        self._journal = Journal(self._paths.metrics, step)
        if self._journal.last_step < step:
            logger.warning(
                f"{self._journal.path} ends at step {self._journal.last_step}, the checkpoint is of step"
                f" {step}: the rows between are lost, training goes on"
            )
        self._history = History(self._config)
        self._figures = Figures(self._config.trainer.max_steps)
        for row in read(self._journal.path):
            self._history.add(row)
            self._figures.add(row)
        # performance.jsonl keeps all rows: a step that is trained twice took its time twice.
        self._performance = Journal(self._paths.performance, sys.maxsize)
        self._add_performance({"step": step, "time": time.time(), "started": True})
        if self._mirror:
            self._mirror.start()  # only now: MLflow must not get rows that the journal drops
        self._progress = Display(self._config.run.name, self._figures)
        self._speed.restart()

    def add(self, step: FinishedStep) -> None:
        """Note a finished step. Nothing is read from the device before `flush`."""
        self._unwritten.append(step)
        self._speed.add_step()

    def add_samples(self, agreed: Agreed | None) -> None:
        """Note the samples that all ranks consumed in a step; None: nothing was agreed."""
        if agreed is not None:
            step = next(each for each in self._unwritten if each.step == agreed.step)
            step.samples = agreed.samples

    def flush(self) -> None:
        """Write the rows of all steps whose samples are known, and a row of speed; look for bad numbers in them."""
        assert self._journal and self._performance and self._progress
        complete = [step for step in self._unwritten if step.samples is not None]
        self._unwritten = [step for step in self._unwritten if step.samples is None]
        if not complete:
            return
        rows = [self._row(step) for step in complete]
        self._journal.append(rows)
        self.last_loss = rows[-1]["loss"]
        for row in rows:
            self._figures.add(row)
        self._drawn = False
        if self._speed.steps:
            speed = self._speed.measure()
            if self._skips:
                speed["skipped_updates"] = self._history.skipped
            # metrics.jsonl has no times, because an interrupted and an uninterrupted run must write the same.
            times = [round(step.time, 3) for step in complete]
            self._add_performance(
                {"step": rows[-1]["step"], "time": time.time(), "step_times": times, **speed}
            )
        self._progress.update()

    def _row(self, step: FinishedStep) -> Row:
        """The journal's row of a step; sets `trouble` if its numbers are bad. Reads the device."""
        loss, unread = step_loss(step.nats, step.weights, step.targets)
        row: Row = {
            "step": step.step,
            "loss": loss,
            **({"bits_per_base": bits(loss)} if self._in_bits else {}),
            "lr": learning_rate(step.step - 1, self._config.optim, self._config.trainer.max_steps),
            "samples": f"{step.samples:016x}",
        }
        if unread:
            row["skipped"] = unread
        trouble = self._history.judge(row, step.grad_norm, step.applied)
        self.trouble = self.trouble or trouble
        return row

    def add_waiting(self, seconds: float) -> None:
        """Add time that training spent waiting for a batch."""
        self._speed.data_seconds += seconds

    def restart_speed(self) -> None:
        """Do not count the time since the last measurement: training was interrupted."""
        self._speed.restart()

    def add_evaluation(self, row: Row, measured: Row) -> None:
        """Write the row of an evaluation and draw the loss curve.

        Args:
            row: for the journal.
            measured: for performance.jsonl, see `Evaluation.measured`.
        """
        assert self._journal and self._progress
        self._journal.append([row])
        self._figures.add(row)
        if measured:
            self._add_performance({"step": row["step"], "time": time.time(), **measured})
        self._speed.restart()
        line = f"step {row['step']}: validation {_found(row)}"
        if text := recall(row):
            line += f"; {text}"
        self.print(line)
        if row.get("full_valid_bases") != row.get("valid_bases") and "full_valid_bases" in row:
            self.print(f"step {row['step']}: the whole validation split {_against_markov(row, 'full_')}")
        self._draw()

    def add_checkpoint(self, saved: Saved) -> None:
        """Write the row of a published checkpoint."""
        row = {"step": saved.step, "time": time.time(), "checkpoint_bytes": saved.size}
        times = {"checkpoint_seconds": saved.seconds, "checkpoint_held_seconds": saved.held}
        self._add_performance(row | times)
        self.print(
            f"step {saved.step}: checkpoint {saved.path} ({saved.size / 2**20:.1f} MiB, {saved.seconds:.1f} s, of which"
            f" training waited {saved.held:.1f} s)"
        )

    def within(self, step: int, done: int, of: int) -> None:
        """Show how far a long step is; see `Display.within`."""
        if self._progress:
            self._progress.within(step, done, of)

    def print(self, text: str) -> None:
        """Print one line, above the figures on a terminal."""
        assert self._progress
        self._progress.print(text)

    def close(self) -> None:
        """Close the journals and draw the loss curve. A second call does nothing."""
        if self._journal and self._performance and self._progress:
            if self._history.skipped:
                self.print(
                    f"updates skipped so far: {self._history.skipped}; their windows are in {self._paths.logs}"
                )
            self._progress.close()
            self._journal.close()
            self._performance.close()
            if not self._drawn:
                self._draw()
        self._journal = self._performance = self._progress = None

    def _add_performance(self, row: Row) -> None:
        assert self._performance
        self._performance.append([row])
        self._figures.add(row)

    def _draw(self) -> None:
        try:
            loss_curve(self._config.directory)
        except Exception as error:  # a picture that fails must not end training, nor hide why training ended
            logger.warning(f"the loss curve cannot be drawn: {first_line(error)}")
        self._drawn = True


def _found(row: Row) -> str:
    """What an evaluation found: bits per base beside Markov models, or the values of another task."""
    if "valid_bits_per_base" in row:
        return _against_markov(row)
    return ", ".join(f"{name} {value:.4f}" for name, value in measures(row))


def _against_markov(row: Row, prefix: str = "") -> str:
    """The bits per base of an evaluation beside those of Markov models. prefix: of the names in the row."""
    orders = "  ".join(f"{row[key]:.4f}" for key in row if key.startswith(f"{prefix}markov_"))
    return f"{row[f'{prefix}valid_bits_per_base']:.4f} bits/base (Markov 0, 1, ...: {orders})"
