"""Numbers that go wrong: noticed at the step where it happens, and kept out of checkpoints.

`bad_windows.py` traces them to their windows.

Bad is a loss or a gradient norm that is not finite, and a loss that explodes. `History` decides: it is a function of
the journal, so a resumed run judges as the uninterrupted one did.

With `guard.on_bad=stop` nothing is read from the device for it: the rows are judged when they are written, and all of
them before a checkpoint. With `skip` every rank reads the loss of a step, summed over ranks, before the last backward
pass of that step, and turns the gradient into NaN where the loss is bad. A gradient that is not finite is what
DeepSpeed drops by itself, on every rank and in every stage, with weights, moments and step count left as they are: so
there is one way to skip an update, whatever was wrong. Stage 0 in fp32 is the exception, where DeepSpeed steps a plain
optimizer: `zero.adamw.PlainAdamW` does it there.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megabase.pipeline.config.schema import SKIP, RunConfig
from megabase.pipeline.hardware import precision_of
from megabase.pipeline.rundir.journal import Row, read
from megabase.pipeline.rundir.paths import RunPaths

# A loss can only have exploded when so many are known.
LEAST_LOSSES = 8
# fp16 halves its loss scale when a gradient overflows, from 2^32 or less to 1. After so many in a row the scale is not
# the reason.
MOST_SCALINGS = 40


@dataclass(frozen=True)
class Trouble:
    """Why a run must end, or an update be skipped: the step, what is bad there, and what to do about it."""

    step: int
    text: str
    way_out: str = "a lower optim.lr or optim.clip may help"


class History:
    """The last training rows of a run, by which the next one is judged. skipped: updates skipped in all rows seen."""

    def __init__(self, config: RunConfig, rows: Iterable[Row] = ()) -> None:
        self._guard = config.guard
        self._half = precision_of(config.trainer.precision) == "16"
        self._guess = math.log(config.model.vocab_size or 1)
        # None: the update was skipped.
        self._recent: deque[float | None] = deque(maxlen=config.guard.window)
        self._scalings = 0  # in a row
        self.skipped = 0
        for row in rows:
            self.add(row)

    def add(self, row: Row) -> None:
        """Note a finished step: its row of the journal, others do not count."""
        if "loss" in row:
            self._scalings = self._scalings + 1 if row.get("loss_scale_skip") else 0
            skipped = bool(row.get("skipped_update"))
            self.skipped += skipped
            self._recent.append(None if skipped else float(row["loss"]))

    def bad_loss(self, loss: float) -> str:
        """What is wrong with the next loss (nats per base), as "is ..."; empty: nothing."""
        if not math.isfinite(loss):
            return f"is {loss}"
        known = [before for before in self._recent if before is not None]
        if not self._guard.spike or len(known) < LEAST_LOSSES:
            return ""
        usual = statistics.median(known)
        # Above what guessing costs, too: from 0.001 to 0.01 is no explosion.
        if loss <= max(self._guard.spike * usual, self._guess):
            return ""
        return (
            f"is {loss:.4g}, more than guard.spike={self._guard.spike:g} times the median {usual:.4g} of the"
            f" {len(known)} before it"
        )

    def skipped_for(self, step: int, loss: float, applied: bool) -> str:
        """Why the update of the next step was skipped; empty: it was not, or fp16 did it to find its loss scale.

        applied: whether DeepSpeed made the update.
        """
        if applied or self._guard.on_bad != SKIP:
            return ""
        if bad := self.bad_loss(loss):
            return f"the loss of step {step} {bad}"
        return "" if self._half else f"the gradient norm of step {step} is not finite"

    def judge(self, row: Row, grad_norm: Any, applied: bool) -> Trouble | None:
        """Complete the next row by its gradient norm or by why there was no update, note it, and find trouble in it.

        Args:
            row: of the journal, with `step` and `loss` (nats per base).
            grad_norm: a number, or a tensor that is read now; None: unknown.
            applied: whether DeepSpeed made the update; it drops one whose gradients are not finite.
        """
        step, bad = row["step"], self.bad_loss(row["loss"])
        trouble = None
        if self.skipped_for(step, row["loss"], applied):
            row["skipped_update"] = True
        elif not applied and self._half and not bad:
            row["loss_scale_skip"] = True
        else:
            if grad_norm is not None:
                row["grad_norm"] = float(grad_norm)
            if bad:
                trouble = Trouble(step, f"the loss of step {step} {bad}", self._way_out)
            elif not math.isfinite(row.get("grad_norm", 0.0)):
                said = f"the gradient norm of step {step} is {row['grad_norm']}"
                trouble = Trouble(step, said, self._way_out)
        self.add(row)
        if self._scalings >= MOST_SCALINGS:
            lost = f"the gradients of {self._scalings} steps in a row were not finite"
            trouble = trouble or Trouble(step, f"step {step}: {lost}, whatever the loss scale")
        return trouble or self._too_many_skips(step)

    def _too_many_skips(self, step: int) -> Trouble | None:
        skips, steps = sum(loss is None for loss in self._recent), len(self._recent)
        if skips < self._guard.max_skips:
            return None
        said = f"step {step}: {skips} of the last {steps} updates were skipped"
        return Trouble(step, f"{said} (guard.max_skips={self._guard.max_skips})")

    @property
    def _way_out(self) -> str:
        other = Trouble.way_out
        return other if self._guard.on_bad == SKIP else f"guard.on_bad=skip leaves such updates out; {other}"


class Guard:
    """One rank's part: it judges the step under way, and keeps what tells the bad micro batch of a step.

    skips: bad updates are skipped, else they end the run.
    """

    def __init__(self, config: RunConfig) -> None:
        self.skips = config.guard.on_bad == SKIP
        self._config = config
        # Where updates are skipped, every rank knows all losses; else only rank 0 does, later, in its books.
        self._history = History(config)
        self._loss = math.nan
        # Nats of each micro batch of the last steps, on the device: of so many as may pass until all ranks know that
        # one was bad (rank 0 writes rows every `log_every_steps`, and each agreement takes a step).
        self._steps: deque[tuple[int, Tensor]] = deque(maxlen=config.trainer.log_every_steps + 3)

    def resume(self, rows: Iterable[Row]) -> None:
        """Judge by these rows of the journal from now on."""
        self._history = History(self._config, rows)

    def drops(self, loss: float) -> bool:
        """Whether the update of the step under way must be dropped for its `loss`, of all ranks."""
        self._loss = loss
        return bool(self._history.bad_loss(loss))

    def finish(self, step: int, micro_nats: list[Tensor], applied: bool) -> str:
        """Note a finished step; returns why its update was skipped, empty if it was not.

        Args:
            micro_nats: sum of nats of each of this rank's micro batches, on the device.
            applied: whether DeepSpeed made the update.
        """
        self._steps.append((step, torch.stack(micro_nats)))
        if not self.skips:
            return ""
        why = self._history.skipped_for(step, self._loss, applied)
        self._history.add({"loss": self._loss, "skipped_update": bool(why)})
        return why

    def micro_nats(self, step: int) -> list[float]:
        """Nats of each of this rank's micro batches of a recent step; reads the device."""
        return next((nats.tolist() for known, nats in self._steps if known == step), [])


def recent_rows(config: RunConfig, step: int) -> list[Row]:
    """The training rows of the run's journal up to `step` that `History` looks at."""
    rows = read(RunPaths(config.directory).metrics)
    return list(
        deque((row for row in rows if "loss" in row and row["step"] <= step), maxlen=config.guard.window)
    )


def step_loss(nats: Tensor, scored: Tensor | None, targets: float) -> tuple[float, int]:
    """Loss of a step in nats per scored base, and its windows that could not be read; reads the device.

    nats: of all ranks. scored: (2,) weight of the labels and windows not read, of all ranks; None where all of the
    `targets` labels were scored alike.
    """
    weight, unread = (targets, 0) if scored is None else scored.tolist()
    if unread and not weight:  # nothing could be read: going on would train on nothing
        return math.nan, int(unread)
    return float(nats) / (weight or 1), int(unread)
