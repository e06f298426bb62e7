"""The progress of a run for people: a block of figures that is redrawn on a terminal, plain lines elsewhere.

`figures.py` says what is shown; this draws it. A training redraws when it writes its journal, `megabase watch` once a
second. No thread runs in between, so training pays for nothing but its own calls.
"""

from __future__ import annotations

import sys
import time

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from megabase.pipeline.log import PROGRESS, console
from megabase.pipeline.rundir.figures import Figures, fields, line

# A step that takes longer than this many seconds shows how far it is.
LONG_STEP_S = 30.0
# Without a terminal: the least seconds between two lines.
LINE_S = 10.0
# On a terminal: the least seconds between two drawings.
DRAW_S = 1.0
# Columns of the bar on a wide terminal.
_BAR = 60


class Display:
    """Shows the figures of a run that trains. For rank 0.

    Args:
        name: of the run.
        figures: shown at each `update`; the caller adds the rows.
    """

    def __init__(self, name: str, figures: Figures) -> None:
        self._figures = figures
        self._shown: int | None = None  # the step that was shown last
        self._last = 0.0  # when that was
        self._inner = InnerStep()
        drawn = sys.stderr.isatty() and not console().is_dumb_terminal
        self._block = Block(name, console()) if drawn else None

    def update(self) -> None:
        """Show the figures, unless they were shown a moment ago (`DRAW_S`, `LINE_S`) and the run goes on."""
        now = time.monotonic()
        last = self._figures.step == self._figures.max_steps
        if last or now - self._last >= (DRAW_S if self._block else LINE_S):
            self._show()
            self._last = now

    def within(self, step: int, done: int, of: int) -> None:
        """Show progress inside a step, if it has taken longer than `LONG_STEP_S` seconds by now.

        Call it after each micro batch; a call that shows nothing costs a microsecond.

        Args:
            step: number of the step under way.
            done: micro batches of it that are done.
            of: its micro batches.
        """
        text = self._inner.text(step, done, of, time.monotonic())
        if not text:
            return
        if self._block:
            self._block.draw(self._figures, time.time(), within=text)
        else:
            PROGRESS.info(text)

    def print(self, text: str) -> None:
        """Print one line, above the figures on a terminal."""
        PROGRESS.info(text)

    def close(self) -> None:
        """Show the last step, if it is not shown yet, and leave the figures on the terminal."""
        if self._figures.step and self._shown != self._figures.step:
            self._show()
        if self._block:
            self._block.draw(self._figures, time.time())
            self._block.close()

    def _show(self) -> None:
        if self._block:
            self._block.draw(self._figures, time.time())
        else:
            PROGRESS.info(line(self._figures, time.time()))
        self._shown = self._figures.step


class InnerStep:
    """Says how far a long step is, at most every `LONG_STEP_S` seconds."""

    def __init__(self) -> None:
        self._step, self._since, self._said = -1, 0.0, 0.0

    def text(self, step: int, done: int, of: int, now: float) -> str:
        """What to show; empty for nothing. Arguments as for `Display.within`; `now` in seconds."""
        if step != self._step:
            self._step, self._since, self._said = step, now, now
        if done >= of or now - self._said < LONG_STEP_S:
            return ""
        self._said = now
        return f"step {step:,}: {done:,} of {of:,} micro batches after {now - self._since:.0f} s"


class Block:
    """The figures of a run as a block of lines on a terminal, redrawn in place.

    Args:
        name: of the run.
        terminal: what to draw on. Lines printed on it meanwhile appear above the block.
    """

    def __init__(self, name: str, terminal: Console) -> None:
        self._name = name
        self._live = Live(console=terminal, auto_refresh=False, vertical_overflow="crop")
        self._live.start()
        terminal.show_cursor(True)  # a process that is killed could not show it again

    def draw(self, figures: Figures, now: float, **more: str) -> None:
        """Draw the figures at `now` (Unix time), and then `more` lines: name=text."""
        self._live.update(block(self._name, figures, now, **more), refresh=True)

    def close(self) -> None:
        """Leave the last drawing on the terminal."""
        self._live.stop()


def block(name: str, figures: Figures, now: float, **more: str) -> RenderableType:
    """The figures of a run as lines, for a terminal of any width: its name and a bar, then a line for each field."""
    head = Table.grid(padding=(0, 2))
    head.add_column(overflow="fold")
    head.add_column(max_width=_BAR)
    bar = ProgressBar(total=max(figures.max_steps or 1, 1), completed=figures.step, width=None)
    head.add_row(name, bar if figures.max_steps else "")
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in (*fields(figures, now), *more.items()):
        table.add_row(f"  {key}", value)
    return Group(head, table)
