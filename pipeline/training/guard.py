"""Bad numbers: found at the step where they occur, and kept out of checkpoints. `bad_windows.py` finds their windows.

Bad numbers are a loss or gradient norm that is not finite, and a loss that explodes. `History` judges them by the rows
of the journal alone, so a resumed run decides as the uninterrupted run did.

With `guard.on_bad=stop` nothing more is read from the device: rows are judged when they are written, and always before
a checkpoint is. With `guard.on_bad=skip` every rank reads the loss of a step, that of all ranks, before the last
backward pass of the step. If the loss is bad, the rank turns its gradients into NaN. DeepSpeed skips an update whose
gradients are not finite, on every rank and in every ZeRO stage, and leaves weights, moments and the step count
unchanged. So there is one way to skip an update, whatever was wrong. Stage 0 in fp32 is the exception: there DeepSpeed
steps a plain optimizer, and `zero.adamw.PlainAdamW` skips.
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

# A loss can count as exploded only if at least this many losses before it are known.
LEAST_LOSSES = 8
# fp16 halves its loss scale when a gradient overflows. The scale starts at 2^32 or less, so after this many skipped
# updates in a row it cannot be the reason.
MOST_SCALINGS = 40


@dataclass(frozen=True)
class Trouble:
    """Why a run must end or an update is skipped.

    Attributes:
        step: number of the step.
        text: what is bad there.
        way_out: what the user can do.
    """

    step: int
    text: str
    way_out: str = "a lower optim.lr or optim.clip may help"


class History:
    """The last training rows of a run, by which the next row is judged.

    Args:
        config: of the run; `guard.window` rows are kept.
        rows: of the journal, the oldest first.

    Attributes:
        skipped: number of skipped updates in all rows.
    """

    def __init__(self, config: RunConfig, rows: Iterable[Row] = ()) -> None:
        self._guard = config.guard
        self._half = precision_of(config.trainer.precision) == "16"
        self._loss_of_guessing = math.log(config.model.vocab_size or 1)
        # Losses; None for a step whose update was skipped.
        self._recent: deque[float | None] = deque(maxlen=config.guard.window)
        self._scalings = 0  # updates in a row that fp16 skipped to lower its loss scale
        self.skipped = 0
        for row in rows:
            self.add(row)

    def add(self, row: Row) -> None:
        """Note a row of the journal, if it is one of a training step."""
        if "loss" in row:
            self._scalings = self._scalings + 1 if row.get("loss_scale_skip") else 0
            skipped = bool(row.get("skipped_update"))
            self.skipped += skipped
            self._recent.append(None if skipped else float(row["loss"]))

    def bad_loss(self, loss: float) -> str:
        """What is wrong with the next loss (nats per base), such as "is nan"; empty if nothing is wrong."""
        if not math.isfinite(loss):
            return f"is {loss}"
        known = [before for before in self._recent if before is not None]
        if not self._guard.spike or len(known) < LEAST_LOSSES:
            return ""
        usual = statistics.median(known)
        # A loss below that of guessing is no explosion, even if it rises from 0.001 to 0.01.
        if loss <= max(self._guard.spike * usual, self._loss_of_guessing):
            return ""
        return (
            f"is {loss:.4g}, more than guard.spike={self._guard.spike:g} times the median {usual:.4g} of the"
            f" {len(known)} before it"
        )

    def why_skipped(self, step: int, loss: float, applied: bool) -> str:
        """Why the update of the next step was skipped.

        Args:
            step: number of the step.
            loss: of the step, nats per base.
            applied: whether DeepSpeed made the update.

        Returns:
            The reason; empty if the update was not skipped, or if fp16 skipped it to lower its loss scale.
        """
        if applied or self._guard.on_bad != SKIP:
            return ""
        if bad := self.bad_loss(loss):
            return f"the loss of step {step} {bad}"
        return "" if self._half else f"the gradient norm of step {step} is not finite"

    def judge(self, row: Row, grad_norm: Any, applied: bool) -> Trouble | None:
        """Complete the next row, note it and look for bad numbers in it.

        Args:
            row: of the journal, with `step` and `loss` (nats per base). It gets `grad_norm`, or `skipped_update` or
                `loss_scale_skip` if there was no update.
            grad_norm: a number, or a tensor that is read now; None if it is not known.
            applied: whether DeepSpeed made the update; it skips one whose gradients are not finite.

        Returns:
            Why the run must end; None if it goes on.
        """
        step, bad = row["step"], self.bad_loss(row["loss"])
        trouble = None
        if self.why_skipped(step, row["loss"], applied):
            row["skipped_update"] = True
        elif not applied and self._half and not bad:
            row["loss_scale_skip"] = True
        else:
            if grad_norm is not None:
                row["grad_norm"] = float(grad_norm)
            if bad:
                trouble = Trouble(step, f"the loss of step {step} {bad}", self._way_out)
            elif not math.isfinite(row.get("grad_norm", 0.0)):
                text = f"the gradient norm of step {step} is {row['grad_norm']}"
                trouble = Trouble(step, text, self._way_out)
        self.add(row)
        if self._scalings >= MOST_SCALINGS:
            text = f"step {step}: the gradients of {self._scalings} steps in a row were not finite"
            trouble = trouble or Trouble(step, f"{text}, whatever the loss scale")
        return trouble or self._too_many_skips(step)

    def _too_many_skips(self, step: int) -> Trouble | None:
        skips, steps = sum(loss is None for loss in self._recent), len(self._recent)
        if skips < self._guard.max_skips:
            return None
        text = f"step {step}: {skips} of the last {steps} updates were skipped"
        return Trouble(step, f"{text} (guard.max_skips={self._guard.max_skips})")

    @property
    def _way_out(self) -> str:
        general = Trouble.way_out
        return (
            general if self._guard.on_bad == SKIP else f"guard.on_bad=skip leaves such updates out; {general}"
        )


class Guard:
    """On every rank: judges the loss of the step under way, and keeps the losses of the last micro batches.

    Attributes:
        skips: bad updates are skipped; if false, they end the run.
    """

    def __init__(self, config: RunConfig) -> None:
        self.skips = config.guard.on_bad == SKIP
        self._config = config
        # Used only if updates are skipped, when every rank reads all losses. Otherwise rank 0 judges them (`Recorder`).
        self._history = History(config)
        self._loss = math.nan
        # Nats of each micro batch of the last steps, on the device. Ranks learn of a bad step up to this many steps
        # later: rank 0 writes rows every `log_every_steps`, and each agreement takes a step.
        self._steps: deque[tuple[int, Tensor]] = deque(maxlen=config.trainer.log_every_steps + 3)

    def resume(self, rows: Iterable[Row]) -> None:
        """Judge by these rows of the journal from now on."""
        self._history = History(self._config, rows)

    def is_bad(self, loss: float) -> bool:
        """Whether the update of the step under way must be skipped because of its `loss` (of all ranks)."""
        self._loss = loss
        return bool(self._history.bad_loss(loss))

    def finish(self, step: int, micro_nats: list[Tensor], applied: bool) -> str:
        """Note a finished step.

        Args:
            step: number of the step.
            micro_nats: sum of nats of each of this rank's micro batches, on the device.
            applied: whether DeepSpeed made the update.

        Returns:
            Why its update was skipped; empty if it was not.
        """
        self._steps.append((step, torch.stack(micro_nats)))
        if not self.skips:
            return ""
        reason = self._history.why_skipped(step, self._loss, applied)
        self._history.add({"loss": self._loss, "skipped_update": bool(reason)})
        return reason

    def micro_nats(self, step: int) -> list[float]:
        """Nats of each of this rank's micro batches of a recent step; reads the device."""
        return next((nats.tolist() for known, nats in self._steps if known == step), [])


def recent_rows(config: RunConfig, step: int) -> list[Row]:
    """The last `guard.window` training rows up to `step` of the run's journal."""
    rows = read(RunPaths(config.directory).metrics)
    return list(
        deque((row for row in rows if "loss" in row and row["step"] <= step), maxlen=config.guard.window)
    )


def step_loss(nats: Tensor, scored: Tensor | None, targets: float) -> tuple[float, int]:
    """Loss of a step in nats per scored base, and the number of its windows that could not be read. Reads the device.

    Args:
        nats: sum over all ranks.
        scored: (2,) the weight of the labels and the windows not read, of all ranks; None if all labels weigh 1.
        targets: number of labels in the global batch.
    """
    weight, unread = (targets, 0) if scored is None else scored.tolist()
    if unread and not weight:  # no window could be read: NaN ends the run, which would train on nothing
        return math.nan, int(unread)
    return float(nats) / (weight or 1), int(unread)
