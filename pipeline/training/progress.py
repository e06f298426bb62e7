"""The progress of a training in one line: a bar on a terminal, plain lines in a log file."""

from __future__ import annotations

import sys
import time

from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from megabase.pipeline.log import PROGRESS, console


class ProgressLine:
    """Shows step, loss (nats), bits per base, tokens per second and the time left. For rank 0.

    Args:
        max_steps: the last step of the run.
        start: optimizer steps done already.
        every_s: without a terminal, the least seconds between two lines.
    """

    def __init__(self, max_steps: int, start: int, every_s: float = 10.0) -> None:
        self._max_steps = max_steps
        self._every_s = every_s
        self._last_line = 0.0
        self._start_time, self._start = time.monotonic(), start
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        if sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
                BarColumn(),
                TextColumn("{task.fields[text]}"),
                TimeRemainingColumn(),
                console=console(),
                refresh_per_second=4,
            )
            self._task = self._bar.add_task("train", total=max_steps, completed=start, text="")
            self._bar.start()

    def update(self, step: int, loss: float, bits_per_base: float, tokens_per_second: float) -> None:
        """Show the figures of a step."""
        text = f"loss {loss:.4f}  {bits_per_base:.4f} bits/base  {tokens_per_second:,.0f} tokens/s"
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step, text=text)
            return
        now = time.monotonic()
        if now - self._last_line >= self._every_s or step == self._max_steps:
            self._last_line = now
            seconds_per_step = (now - self._start_time) / max(step - self._start, 1)
            left = clock(seconds_per_step * (self._max_steps - step))
            self.print(f"step {step}/{self._max_steps}  {text}  {left} left")

    def print(self, text: str) -> None:
        """Print one line, above the bar if there is one."""
        PROGRESS.info(text)

    def close(self) -> None:
        """Remove the bar from the terminal."""
        if self._bar is not None:
            self._bar.stop()


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
