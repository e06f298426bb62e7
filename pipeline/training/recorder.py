"""Rank 0's books: what is written down of a run while it trains, and shown."""

from __future__ import annotations

import logging
import sys
import time
from typing import Any

import torch

from megabase.models.flops import training_flops_per_token
from megabase.pipeline.checkpoint.saver import Saved
from megabase.pipeline.config.schema import SKIP, RunConfig
from megabase.pipeline.errors import first_line
from megabase.pipeline.hardware import peak_flops, peak_memory, precision_of
from megabase.pipeline.ranks.agreement import Agreed
from megabase.pipeline.rundir.journal import Journal, Row, read
from megabase.pipeline.rundir.paths import RunPaths
from megabase.pipeline.tracking.mirror import Mirror
from megabase.pipeline.training.evaluate import bits
from megabase.pipeline.training.guard import History, Trouble, step_loss
from megabase.pipeline.training.module import learning_rate
from megabase.pipeline.training.plots import loss_curve
from megabase.pipeline.training.progress import ProgressLine

logger = logging.getLogger(__name__)


class Recorder:
    """Rank 0's books: the journal, the figures of speed, the progress line and the picture."""

    def __init__(self, config: RunConfig, ranks: int, mirror: Mirror | None) -> None:
        self._config = config
        self._mirror = mirror
        # What forbids to publish a checkpoint and to go on.
        self.trouble: Trouble | None = None
        self._skips = config.guard.on_bad == SKIP
        self._history = History(config)
        self._speed = Speed(config, ranks)
        self._waiting: list[tuple[Row, torch.Tensor, torch.Tensor | None, int, Any, bool]] = []
        self._progress: ProgressLine | None = None
        self._journal: Journal | None = None
        self._performance: Journal | None = None

    def begin(self, step: int) -> None:
        """Open the books at `step`: later rows are dropped, training computes them again."""
        paths = RunPaths(self._config.directory)
        self._journal = Journal(paths.metrics, step)
        if self._journal.last_step < step:
            logger.warning(
                f"{self._journal.path} ends at step {self._journal.last_step}, the checkpoint is of step"
                f" {step}: the rows between are lost, training goes on"
            )
        self._history = History(self._config, read(self._journal.path))
        # What happened stays: a restart adds to the record of speed and removes nothing from it.
        self._performance = Journal(paths.performance, sys.maxsize)
        self._performance.append([{"step": step, "time": time.time(), "started": True}])
        if self._mirror:
            self._mirror.start()  # only now: it must not read rows that are about to be dropped
        self._progress = ProgressLine(self._config.trainer.max_steps, step)
        self._speed.restart()

    def add(
        self,
        step: int,
        nats: torch.Tensor,
        scored: torch.Tensor | None,
        targets: int,
        grad_norm: Any,
        applied: bool = True,
    ) -> None:
        """Note a finished step; nothing is read from the device before `flush`.

        nats, scored, targets: see `guard.step_loss`. applied: whether DeepSpeed made the update; it drops one whose
        gradients are not finite.
        """
        rate = learning_rate(step - 1, self._config.optim, self._config.trainer.max_steps)
        self._waiting.append(({"step": step, "lr": rate}, nats, scored, targets, grad_norm, applied))
        self._speed.steps += 1

    def confirm(self, agreed: Agreed | None) -> None:
        """Add the samples that all ranks consumed in a step to its row."""
        if agreed is not None:
            row = next(row for row, *_ in self._waiting if row["step"] == agreed.step)
            row["samples"] = f"{agreed.samples:016x}"

    def flush(self) -> None:
        """Write the rows that are complete, and one of speed."""
        assert self._journal and self._performance and self._progress
        complete = [entry for entry in self._waiting if "samples" in entry[0]]
        self._waiting = [entry for entry in self._waiting if "samples" not in entry[0]]
        if not complete:
            return
        rows = []
        for row, nats, scored, targets, grad_norm, applied in complete:
            loss, unread = step_loss(nats, scored, targets)
            rows.append({"step": row["step"], "loss": loss, "bits_per_base": bits(loss)} | row)
            if unread:
                rows[-1]["skipped"] = unread
            trouble = self._history.judge(rows[-1], grad_norm, applied)
            self.trouble = self.trouble or trouble
        self._journal.append(rows)
        if self._speed.steps:
            speed = self._speed.measure()
            if self._skips:
                speed["skipped_updates"] = self._history.skipped
            self._performance.append([{"step": rows[-1]["step"], "time": time.time(), **speed}])
            last = rows[-1]
            self._progress.update(
                last["step"], last["loss"], last["bits_per_base"], speed["tokens_per_second"]
            )

    def waited(self, seconds: float) -> None:
        """Add time that training spent waiting for a batch."""
        self._speed.data_seconds += seconds

    def evaluated(self, row: Row) -> None:
        """Write the row of an evaluation; its time does not count as training."""
        assert self._journal and self._progress
        self._journal.append([row])
        self._speed.restart()
        ladder = "  ".join(f"{row[key]:.4f}" for key in row if key.startswith("markov_"))
        self.say(
            f"step {row['step']}: validation {row['valid_bits_per_base']:.4f} bits/base (Markov 0, 1, ...: {ladder})"
        )
        self._draw()

    def say(self, text: str) -> None:
        """Print one line beside the progress."""
        assert self._progress
        self._progress.print(text)

    def saved(self, saved: Saved) -> None:
        """Note a published checkpoint."""
        assert self._performance and self._progress
        row = {"step": saved.step, "time": time.time(), "checkpoint_bytes": saved.size}
        times = {"checkpoint_seconds": saved.seconds, "checkpoint_held_seconds": saved.held}
        self._performance.append([row | times])
        self.say(
            f"step {saved.step}: checkpoint {saved.path} ({saved.size / 2**20:.1f} MiB, {saved.seconds:.1f} s, of which"
            f" training waited {saved.held:.1f} s)"
        )

    def held(self) -> None:
        """Training was held up: what passed since the last measurement is no speed of training."""
        self._speed.restart()

    def close(self) -> None:
        """Draw the picture and close the books."""
        if self._journal and self._performance and self._progress:
            if self._history.skipped:
                logs = RunPaths(self._config.directory).logs
                self.say(f"updates skipped so far: {self._history.skipped}; their windows are in {logs}")
            self._progress.close()
            self._journal.close()
            self._performance.close()
            self._draw()
        self._journal = self._performance = self._progress = None

    def _draw(self) -> None:
        try:
            loss_curve(self._config.directory)
        except Exception as error:  # a picture is no reason to end a training, nor to hide why one ended
            logger.warning(f"the loss curve cannot be drawn: {first_line(error)}")


class Speed:
    """Throughput since the last measurement. Evaluations and checkpoints do not count: `restart` after them.

    steps: optimizer steps since then. data_seconds: time of them spent waiting for batches.
    """

    def __init__(self, config: RunConfig, ranks: int) -> None:
        self._ranks = ranks
        self._tokens_per_step = config.data.global_batch * config.data.length
        self._flops = training_flops_per_token(config.model, config.data.length)
        self._peak = None
        if torch.cuda.is_available():
            self._peak = peak_flops(torch.cuda.get_device_name(), precision_of(config.trainer.precision))
        self.restart()

    def restart(self) -> None:
        """Measure from now on."""
        self._since = time.monotonic()
        self.steps = 0
        self.data_seconds = 0.0

    def measure(self) -> Row:
        """The figures since the last measurement; starts the next one.

        tokens_per_second (all ranks, and _per_device); model_tflops (per device: what the model needs, backward
        twice forward) and hardware_tflops (as run: a reversible model computes forward twice); mfu and hfu,
        these as shares of the device's peak, where its data sheet is known; peak_memory_bytes of rank 0; data_wait,
        the share of time spent waiting for batches.
        """
        seconds = max(time.monotonic() - self._since, 1e-9)
        rate = self._tokens_per_step * self.steps / seconds
        per_device = rate / self._ranks
        model, hardware = (per_device * flops for flops in self._flops)
        row: Row = {
            "tokens_per_second": rate,
            "tokens_per_second_per_device": per_device,
            "model_tflops": model / 1e12,
            "hardware_tflops": hardware / 1e12,
            "peak_memory_bytes": peak_memory(),
            "data_wait": self.data_seconds / seconds,
        }
        if self._peak:
            row |= {"mfu": model / self._peak, "hfu": hardware / self._peak}
        self.restart()
        return row
