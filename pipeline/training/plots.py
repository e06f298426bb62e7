"""The loss curve of a run as a picture, drawn from its journal."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from megabase.pipeline.inference.scoring import bits
from megabase.pipeline.rundir.journal import Row, read
from megabase.pipeline.rundir.paths import RunPaths

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def loss_curve(directory: Path) -> Path | None:
    """Draw `loss.png`: bits per base (of another task the loss) of training, validation and Markov models, and recall.

    Args:
        directory: the run directory.

    Returns:
        The picture; None if the journal has no training row yet.
    """
    # matplotlib's object interface, because pyplot keeps global state and looks for a display.
    from matplotlib.figure import Figure

    rows = list(read(RunPaths(directory).metrics))
    # A fine-tuning has no bits per base: its loss is drawn as it is.
    in_bits = any("bits_per_base" in row for row in rows)
    unit, evaluated = ("bits per base", "valid_bits_per_base") if in_bits else ("loss", "valid_loss")
    train = [(step, bits(loss) if in_bits else loss) for step, loss in _points(rows, "loss")]
    valid, recall = _points(rows, evaluated), _points(rows, "valid_recall_bits")
    if not train:
        return None
    height = 6.5 if recall else 5.0
    figure = Figure(figsize=(9, height))
    # In inches. Matplotlib's own layouts take half as long again, and the other ranks wait.
    figure.subplots_adjust(left=0.8 / 9, right=1 - 0.15 / 9, bottom=0.5 / height, top=1 - 0.35 / height)
    panels = figure.subplots(
        1 + bool(recall), sharex=True, squeeze=False, height_ratios=[3, 1][: 1 + bool(recall)]
    )
    axes = panels[0, 0]
    axes.plot(*zip(*train, strict=True), linewidth=0.8, color="#7aa6c2", label="training")
    if valid:
        _draw_evaluations(axes, rows, valid, right=train[-1][0])
    starts = [row["step"] for row in read(RunPaths(directory).performance) if row.get("started")]
    for number, step in enumerate(starts[1:]):
        axes.axvline(step, color="#999999", linewidth=1, label="resumed" if number == 0 else None)
    panels[-1, 0].set_xlabel("optimizer step")
    if recall:
        panels[1, 0].plot(*zip(*recall, strict=True), "o-", markersize=4, color="#4c7a34")
        panels[1, 0].set_ylabel("bits gained\nby a copy")
        panels[1, 0].set_ylim(bottom=min(0.0, *(value for _, value in recall)))
    axes.set_ylabel(unit)
    # The y-axis does not cover the losses of the first steps, which would flatten the rest of the curve.
    tail = [value for _, value in train[len(train) // 20 :]] + [value for _, value in valid]
    if in_bits:
        axes.set_ylim(min(tail) - 0.02, max(2.05, min(max(tail), 2.3)))
    axes.set_title(f"{directory.name}: {unit}")
    axes.legend(loc="upper right")
    path = RunPaths(directory).loss_curve
    partial = directory / "loss.partial.png"
    figure.savefig(partial, dpi=120)
    partial.rename(path)
    return path


def _points(rows: list[Row], name: str) -> list[tuple[int, float]]:
    """(step, value) of the rows that have a number; NaN is written as a string."""
    return [(row["step"], row[name]) for row in rows if isinstance(row.get(name), float)]


def _draw_evaluations(axes: Axes, rows: list[Row], valid: list[tuple[int, float]], right: int) -> None:
    """Draw the curve of validation, the whole split at the end, and the lines of Markov models.

    Args:
        axes: to draw on.
        rows: of the journal.
        valid: (step, bits per base) of every evaluation.
        right: the step at which the names of the lines end.
    """
    axes.plot(*zip(*valid, strict=True), "o-", markersize=4, color="#b5472f", label="validation")
    full = [(row["step"], row["full_valid_bits_per_base"]) for row in rows if _differs(row)]
    if full:
        axes.plot(*zip(*full, strict=True), "x", color="#b5472f", label="the whole validation split")
    last = next(row for row in reversed(rows) if "valid_loss" in row)
    for order in (0, 2, 5):
        value = last.get(f"markov_{order}_bits_per_base")
        if value is not None:
            axes.axhline(value, linestyle=":", linewidth=1, color="#555555")
            axes.annotate(f"Markov order {order}", (right, value), ha="right", va="bottom", fontsize=8)


def _differs(row: Row) -> bool:
    """Whether an evaluation at the end of a run scored more windows than those before."""
    full = row.get("full_valid_bits_per_base")
    return isinstance(full, float) and row["full_valid_bases"] != row["valid_bases"]
