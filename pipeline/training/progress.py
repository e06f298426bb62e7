"""One line that says how training goes: a bar in a terminal, plain lines in a log file."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


class ProgressLine:
    """For rank 0. Shows step, loss (nats), bits per base, tokens per second and the time left."""

    def __init__(self, max_steps: int, start: int, every_s: float = 10.0) -> None:
        self._max = max_steps
        self._every = every_s
        self._last_print = 0.0
        self._began, self._first = time.monotonic(), start
        self._console = Console(stderr=True)
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        if sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
                BarColumn(),
                TextColumn("{task.fields[text]}"),
                TimeRemainingColumn(),
                console=self._console,
                refresh_per_second=4,
            )
            self._task = self._bar.add_task("train", total=max_steps, completed=start, text="")
            self._bar.start()

    def update(self, step: int, loss: float, bits_per_base: float, tokens_per_second: float) -> None:
        """Show the newest figures."""
        text = f"loss {loss:.4f}  {bits_per_base:.4f} bits/base  {tokens_per_second:,.0f} tokens/s"
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step, text=text)
            return
        now = time.monotonic()
        if now - self._last_print >= self._every or step == self._max:
            self._last_print = now
            left = (now - self._began) / max(step - self._first, 1) * (self._max - step)
            self.say(f"step {step}/{self._max}  {text}  {_clock(left)} left")

    def say(self, text: str) -> None:
        """Print one line without disturbing the bar."""
        if self._bar is not None:
            self._console.print(text, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
