"""The progress of a run: lines in a log, a block of figures on a terminal."""

import io

import pytest
from rich.console import Console

from megabase.pipeline.rundir.figures import Figures
from megabase.pipeline.training import progress
from megabase.pipeline.training.progress import LONG_STEP_S, Block, Display, InnerStep
from tests.pipeline.rundir.test_figures import figures_of, loss, speed

FULL = [
    {"step": 0, "time": 0.0, "started": True},
    loss(10, 1.9),
    speed(10, 50.0),
    {"step": 10, "valid_loss": 1.3, "valid_bits_per_base": 1.8},
    {"step": 10, "time": 60.0, "checkpoint_seconds": 1.0},
]


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lines of a log."""
    printed: list[str] = []
    monkeypatch.setattr(progress.PROGRESS, "info", printed.append)
    return printed


def test_a_log_gets_a_line_per_interval_and_always_the_last_step(
    lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    figures = Figures(100)
    display = Display("x", figures)
    for step in range(1, 24):
        figures.add(loss(step, 2.0))
        display.update()
        now += 1.0
    display.close()
    assert [text.split()[1] for text in lines] == ["1/100", "11/100", "21/100", "23/100"]
    display.close()
    assert len(lines) == 4


def test_the_last_step_of_a_run_is_shown_at_once(lines: list[str]) -> None:
    figures = Figures(2)
    display = Display("x", figures)
    for step in (1, 2):
        figures.add(loss(step, 2.0))
        display.update()
    assert [text.split()[1] for text in lines] == ["1/2", "2/2"]
    display.close()
    assert len(lines) == 2


def test_a_run_that_shows_nothing_prints_nothing(lines: list[str]) -> None:
    Display("x", Figures(100)).close()
    assert lines == []


def test_a_long_step_shows_how_far_it_is() -> None:
    inner = InnerStep()
    said = [
        (now, text) for now in range(0, 200, 10) if (text := inner.text(7, now // 10 + 1, 2000, float(now)))
    ]
    assert [now for now, _ in said] == [30, 60, 90, 120, 150, 180]
    assert said[0][1] == "step 7: 4 of 2,000 micro batches after 30 s"
    assert inner.text(8, 1, 2, 300.0) == ""  # the next step has just begun
    assert inner.text(8, 2, 2, 300.0 + 2 * LONG_STEP_S) == ""  # it is done: its own line follows


@pytest.mark.parametrize("width", [30, 50, 200])
def test_a_block_has_every_figure_at_any_width(width: int) -> None:
    output = io.StringIO()
    terminal = Console(file=output, force_terminal=True, width=width, height=60, color_system=None)
    drawn = Block("a-run", terminal)
    drawn.draw(figures_of(FULL), 62.0, within="step 11: 1 of 2 micro batches")
    drawn.close()
    text = " ".join(output.getvalue().split())
    for word in ("a-run", "1.9000", "1.8000", "1,000", "10 of", "tokens", "of 2 micro", "2 s"):
        assert word in text, (word, text)
    longest = max(len(row) for row in output.getvalue().replace("\x1b", "\n").splitlines())
    assert longest <= width + 10  # escape sequences


def test_a_block_leaves_the_cursor_visible() -> None:
    output = io.StringIO()
    terminal = Console(file=output, force_terminal=True, width=80)
    Block("a-run", terminal).draw(figures_of(FULL), 62.0)  # never closed: the process is killed
    assert output.getvalue().rfind("\x1b[?25h") > output.getvalue().rfind("\x1b[?25l")
