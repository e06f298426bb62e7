"""What a run shows of its progress, computed from the rows of its two journals and from nothing else.

A training feeds the rows that it writes, `megabase watch` those that it reads, so both show the same. Imports no torch.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

from megabase.pipeline.readable import age
from megabase.pipeline.rundir.journal import Row

BITS = "bits/base"
# Each step's weight in the smoothed loss is this many times that of the step after it: a mean over about 50 steps.
DECAY = 0.98
# The time left follows from the speed over this many rows of performance.jsonl.
SPEEDS = 50


@dataclass
class Figures:
    """The newest figures of a run.

    Attributes:
        max_steps: the last step of the run; None: not known.
        step: the last step in the journal; 0: none.
        loss: of that step, in bits per base or, of a task without them, as the journal has it; None: none. May be NaN.
        unit: of the loss.
        tokens_per_second: of all ranks, when it was last measured.
        evaluation: the last row of an evaluation.
        checkpoint: the last row of a published checkpoint.
        updated: Unix time of the last row of performance.jsonl.
    """

    max_steps: int | None = None
    step: int = 0
    loss: float | None = None
    unit: str = BITS
    tokens_per_second: float | None = None
    evaluation: Row | None = None
    checkpoint: Row | None = None
    updated: float | None = None
    _sum: float = 0.0
    _weight: float = 0.0
    _start: tuple[int, float] | None = None
    _marks: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=SPEEDS))

    def add(self, row: Row) -> None:
        """Note a row of metrics.jsonl or performance.jsonl. Those of one file come in its order."""
        if "loss" in row:
            self.unit = BITS if "bits_per_base" in row else "loss"
            self.step, self.loss = (
                row["step"],
                float(row["bits_per_base" if "bits_per_base" in row else "loss"]),
            )
            if math.isfinite(self.loss):
                self._sum = DECAY * self._sum + (1 - DECAY) * self.loss
                self._weight = DECAY * self._weight + (1 - DECAY)
        elif "valid_loss" in row:
            self.evaluation = row
        if "time" in row:
            self.updated = row["time"]
        if "started" in row:
            self._start, self.tokens_per_second = (row["step"], row["time"]), None
            self._marks.clear()
        elif "tokens_per_second" in row:
            self.tokens_per_second = row["tokens_per_second"]
            self._marks.append((row["step"], row["time"]))
        elif "checkpoint_seconds" in row:
            self.checkpoint = row

    @property
    def bits(self) -> float | None:
        """Bits per base of the last step; None if there is none."""
        return self.loss if self.unit == BITS else None

    @property
    def smoothed(self) -> float | None:
        """The loss, averaged over about the last 50 steps; steps whose loss is not finite do not count."""
        return self._sum / self._weight if self._weight else None

    def seconds_left(self, now: float) -> float | None:
        """Estimated seconds from `now` (Unix time) to the last step; None: not known, or it is done.

        Evaluations and checkpoints of the last `SPEEDS` measurements count. The start of a run, which compiles, does
        not, from the second measurement on.
        """
        each = self.seconds_per_step
        if self.max_steps is None or each is None or self.step >= self.max_steps:
            return None
        step, at = self._marks[-1]
        return max((self.max_steps - step) * each - (now - at), 0.0)

    @property
    def seconds_per_step(self) -> float | None:
        """Seconds that a step took of late, evaluations and checkpoints included; None: not known."""
        if not self._marks:
            return None
        step, at = self._marks[-1]
        first = self._marks[0] if len(self._marks) > 1 else self._start
        if first is None or step <= first[0]:
            return None
        return (at - first[1]) / (step - first[0])


def line(figures: Figures, now: float) -> str:
    """The figures of the last step in one line."""
    text = f"step {figures.step}{'' if figures.max_steps is None else f'/{figures.max_steps}'}"
    parts = [text, _loss(figures)]
    if figures.tokens_per_second is not None:
        parts.append(f"{figures.tokens_per_second:,.0f} tokens/s")
    left = figures.seconds_left(now)
    if left is not None:
        parts.append(f"{clock(left)} left")
    return "  ".join(part for part in parts if part)


def fields(figures: Figures, now: float) -> list[tuple[str, str]]:
    """(name, value) of all that is known, for a display of several lines.

    Args:
        figures: of the run.
        now: Unix time.
    """
    return [(name, value) for name, value in _fields(figures, now) if value]


def _fields(figures: Figures, now: float) -> list[tuple[str, str]]:
    speed = figures.tokens_per_second
    return [
        ("step", _step(figures, now)),
        ("loss", _loss(figures).replace(" loss", "")),
        ("speed", "" if speed is None else f"{speed:,.0f} tokens/s"),
        ("validation", _validation(figures.evaluation)),
        ("whole split", _validation(figures.evaluation, "full_")),
        ("recall", "" if figures.evaluation is None else recall(figures.evaluation)),
        ("checkpoint", "" if figures.checkpoint is None else _checkpoint(figures.checkpoint, now)),
    ]


def _step(figures: Figures, now: float) -> str:
    if figures.max_steps is None:
        return f"{figures.step:,}" if figures.step else ""
    share = figures.step / max(figures.max_steps, 1)
    left = figures.seconds_left(now)
    text = f"{figures.step:,} of {figures.max_steps:,} ({share:.1%})"
    return text if left is None else f"{text}, {clock(left)} left"


def _loss(figures: Figures) -> str:
    if figures.loss is None:
        return ""
    smoothed = figures.smoothed
    text = f"{figures.loss:.4f} {figures.unit}"
    return text if smoothed is None else f"{text} (smoothed {smoothed:.4f})"


def _validation(row: Row | None, prefix: str = "") -> str:
    """An evaluation in words: of the windows of every evaluation or, with `full_`, of the whole split."""
    if row is None:
        return ""
    if "valid_bits_per_base" not in row:
        found = ", ".join(f"{name} {value:.4f}" for name, value in measures(row))
        return "" if prefix else f"{found} at step {row['step']:,}"
    if f"{prefix}valid_bits_per_base" not in row:
        return ""
    if (
        prefix and row[f"{prefix}valid_bases"] == row["valid_bases"]
    ):  # every evaluation scores the whole split
        return ""
    text = f"{float(row[f'{prefix}valid_bits_per_base']):.4f} bits/base at step {row['step']:,}"
    orders = [key for key in row if key.startswith(f"{prefix}markov_")]
    if not orders:
        return text
    order = orders[-1].removeprefix(f"{prefix}markov_").partition("_")[0]
    return f"{text} (Markov order {order}: {float(row[orders[-1]]):.4f})"


def measures(row: Row) -> list[tuple[str, float]]:
    """(name, value) of what an evaluation of a task without bits per base found: loss, accuracy, ..."""
    counts = ("valid_examples", "valid_bases")
    return [
        (key.removeprefix("valid_"), float(value))
        for key, value in row.items()
        if key.startswith("valid_") and key not in counts
    ]


def recall(row: Row) -> str:
    """What an evaluation says of recall; empty if it was not measured."""
    if "valid_recall_bits" not in row:
        return ""
    copy = float(row["valid_copy_bits_per_base"])
    without = copy + float(row["valid_recall_bits"])
    return f"a repeated stretch {copy:.4f} bits/base, {without:.4f} if it had not come before"


def _checkpoint(row: Row, now: float) -> str:
    return f"step {row['step']:,}, written {age(now - row['time'])} ago"


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
