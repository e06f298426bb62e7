"""Draw tables of recall: python -m benchmarks.learning.draw recall-512.json ... PICTURE.png

For every table (one length each): bits per base on the copy against the training step, and at the end of the training
against the distance from the source.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# matplotlib's object interface, because pyplot keeps global state and looks for a display.
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

STYLES = {
    "ours": ("megabase", "#0072B2", "o"),
    "paper": ("Reformer of the paper", "#D55E00", "^"),
    "full": ("full attention, with the same changes", "#000000", "s"),
    "full-plain": ("full attention", "#7F7F7F", "P"),
    "local": ("local", "#E69F00", "v"),
    "performer": ("Performer, with the same changes", "#009E73", "X"),
}
"""Label, colour and marker of the models that are drawn. Colour-blind people can distinguish these colours (Okabe and
Ito)."""


def main(arguments: Sequence[str]) -> int:
    """Draw the tables named first into the picture named last; returns an exit code."""
    *tables, picture = arguments
    draw([json.loads(Path(table).read_text()) for table in tables], Path(picture))
    return 0


def draw(tables: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw tables of `benchmarks.learning recall`, a row of two panels each."""
    figure = Figure(figsize=(9, 3.2 * len(tables)), layout="constrained")
    panels = figure.subplots(len(tables), 2, squeeze=False)
    for (left, right), table in zip(panels, tables, strict=True):
        length = table["settings"]["length"]
        for row in table["rows"]:
            if row["model"] not in STYLES:
                continue
            label, colour, marker = STYLES[row["model"]]
            style = {"color": colour, "marker": marker, "markersize": 4, "label": label}
            curve = row["curve"]
            left.plot([point["step"] for point in curve], [point["copy"] for point in curve], **style)
            costs = {int(gap): cost for gap, cost in row["by_distance"].items()}
            right.plot(list(costs), list(costs.values()), **style)
        left.set_xlabel(f"training step (length {length:,})")
        right.set_xlabel("bases between a stretch and its copy")
        right.set_xscale("log", base=2)
        right.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
        right.xaxis.set_minor_locator(NullLocator())
        for axes in (left, right):
            _finish(axes)
    panels[0][1].legend(frameon=False, fontsize=8, loc="center right")
    figure.savefig(path, dpi=150)


def _finish(axes: Axes) -> None:
    axes.set_ylabel("bits per base on the copy")
    axes.set_ylim(0, 2.3)
    axes.axhline(2.0, color="#BBBBBB", linewidth=0.8, linestyle=":")
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
