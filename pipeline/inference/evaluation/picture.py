"""An evaluation as a picture: bits per base by position, beside Markov models and compressors; contexts; recall."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megabase.datamodules.files import publish
from megabase.pipeline.inference.evaluation.result import Evaluation
from megabase.pipeline.inference.evaluation.tally import Interval

BLUE, RED, GREY = "#2f6690", "#b5472f", "#555555"
KINDS = {"exact": "#2f6690", "mutated": "#b5472f", "inverted": "#4c7a34"}


def draw(found: Evaluation, path: Path) -> None:
    """Draw an evaluation to a PNG, which appears complete. Raises OSError."""
    from io import BytesIO

    # matplotlib's object interface, because pyplot keeps global state and looks for a display.
    from matplotlib.figure import Figure

    panels = [_positions]
    if found.contexts:
        panels.append(_contexts)
    if found.recall:
        panels.append(_recall)
    if len(found.cases) + len(found.classes) > 1:
        panels.append(_groups)
    rows, columns = -(-len(panels) // 2), min(len(panels), 2)
    figure = Figure(figsize=(5.5 * columns, 4.2 * rows), layout="constrained")
    for number, panel in enumerate(panels, 1):
        panel(figure.add_subplot(rows, columns, number), found)
    figure.suptitle(
        f"{Path(found.model.path).name}, step {found.model.step:,}: split {found.split}", fontsize=11
    )
    content = BytesIO()
    figure.savefig(content, dpi=120, format="png")
    publish(path, content.getvalue())


def _positions(axes: Any, found: Evaluation) -> None:
    known = [(each.start + each.end) / 2 for each in found.positions if each.bits]
    _line(axes, known, [each.bits for each in found.positions if each.bits], BLUE, "model")
    axes.axhline(found.bits_per_base.value, color=BLUE, linewidth=0.8, linestyle="--")
    marks = {f"Markov order {order}": value for order, value in list(found.markov.items())[-1:]}
    marks |= {program.name: program.bits_per_base for program in found.compressors}
    for name, value in marks.items():
        axes.axhline(value, color=GREY, linewidth=0.8, linestyle=":")
        place = {"xycoords": ("axes fraction", "data"), "ha": "right", "va": "bottom"}
        axes.annotate(name, (0.99, value), fontsize=8, color=GREY, **place)
    _powers_of_two(axes)
    axes.set_xlabel("position in the window")
    axes.set_ylabel("bits per base")
    axes.set_title("by position", fontsize=10)


def _contexts(axes: Any, found: Evaluation) -> None:
    known = [each for each in found.contexts if each.bits]
    _line(axes, [each.length for each in known], [each.bits for each in known if each.bits], BLUE, "")
    _powers_of_two(axes)
    axes.set_xlabel("length of the context, bases")
    axes.set_title("the same bases, longer contexts", fontsize=10)


def _recall(axes: Any, found: Evaluation) -> None:
    assert found.recall
    for kind, color in KINDS.items():
        of_kind = [copy for copy in found.recall.copies if copy.kind == kind and copy.gain]
        if of_kind:
            gains = [copy.gain for copy in of_kind if copy.gain]
            _line(axes, [copy.distance for copy in of_kind], gains, color, kind)
    axes.axhline(0, color=GREY, linewidth=0.8)
    _powers_of_two(axes)
    axes.set_xlabel("distance of the copy, bases")
    axes.set_ylabel("bits per base gained by its source")
    axes.set_title("recall", fontsize=10)
    axes.legend(fontsize=8)


def _groups(axes: Any, found: Evaluation) -> None:
    known = [(group.name, group.bits) for group in (*found.cases, *found.classes) if group.bits]
    values = [bits.value for _, bits in known]
    errors = [[bits.value - bits.low for _, bits in known], [bits.high - bits.value for _, bits in known]]
    axes.errorbar(values, range(len(known)), xerr=errors, fmt="o", color=BLUE, capsize=3)
    axes.set_yticks(range(len(known)), [name for name, _ in known])
    axes.invert_yaxis()
    axes.axvline(found.bits_per_base.value, color=BLUE, linewidth=0.8, linestyle="--")
    axes.set_xlabel("bits per base")
    axes.set_title("by class", fontsize=10)


def _powers_of_two(axes: Any) -> None:
    """A logarithmic x-axis with plain numbers."""
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")


def _line(axes: Any, x: Sequence[float], bits: Sequence[Interval], color: str, label: str) -> None:
    """A line through means, with their intervals as a band."""
    axes.plot(x, [each.value for each in bits], "o-", markersize=4, color=color, label=label or None)
    axes.fill_between(
        x, [each.low for each in bits], [each.high for each in bits], color=color, alpha=0.2, linewidth=0
    )
