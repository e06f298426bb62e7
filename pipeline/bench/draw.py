"""Pictures of a result, from its JSON.

python -m megabase.pipeline.bench.draw RESULT.json PICTURE.png     # draws one again
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

# matplotlib's object interface, because pyplot keeps global state and looks for a display.
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

Json = dict[str, Any]

# The colours of Okabe and Ito, which colour-blind people can distinguish; markers distinguish without colours. Ours is
# blue.
STYLES = {
    "ours": ("#0072B2", "o"),
    "ours-ordinary": ("#56B4E9", "D"),
    "sdpa": ("#000000", "s"),
    "sdpa-flash": ("#000000", "s"),
    "sdpa-cudnn": ("#7F7F7F", "P"),
    "transformers": ("#D55E00", "^"),
    "reformer-pytorch": ("#E69F00", "v"),
    "performer-pytorch": ("#009E73", "X"),
    "ours-in-order": ("#56B4E9", "o"),
    "webdataset": ("#D55E00", "^"),
    "webdataset-shuffled": ("#EAAF80", "^"),
    "webdataset-encoded": ("#8A3D00", "^"),
    "mosaicml-streaming": ("#009E73", "v"),
    "mosaicml-streaming-shuffled": ("#80CEB9", "v"),
    "mosaicml-streaming-encoded": ("#005C43", "v"),
    "litdata": ("#CC79A7", "X"),
    "litdata-shuffled": ("#E5BCD3", "X"),
    "litdata-encoded": ("#7D3F62", "X"),
    "copy": ("#7F7F7F", "s"),
}
OTHERS = (("#CC79A7", "h"), ("#56B4E9", "D"), ("#8C6D1F", "<"), ("#5E3C99", ">"), ("#999999", "p"))

MIB, GIB = 2**20, 2**30
LINE = 0.05
"""Height of a line of a label, as a fraction of the axes."""


def attention(result: Json, path: Path) -> None:
    """Time and peak memory against length, all logarithmic."""
    figure = Figure(figsize=(13, 5.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    settings = result["settings"]
    curves(left, result, "length", "seconds", "time, forward + backward")
    curves(right, result, "length", "peak_bytes", "peak memory")
    title(
        figure,
        result,
        f"One attention layer's core, causal: {settings['heads']} heads of {settings['head_dim']}, "
        f"chunk {settings['chunk']}, {settings['rounds']} rounds, {settings['dtype']}",
    )
    save(figure, path)


def model(result: Json, path: Path) -> None:
    """Bars of the speed of a training step, and peak memory against length and depth."""
    settings = result["settings"]
    deep = any(point["along"] == "depth" for point in result["points"])
    figure = Figure(figsize=(17 if deep else 12, 5.2), layout="constrained")
    panels = figure.subplots(1, 3 if deep else 2)
    speed_bars(panels[0], result)
    far = any(point["along"] == "longest" for point in result["points"])
    along = "longest" if far else "length"
    curves(panels[1], result, along, "peak_bytes", f"peak memory, depth {settings['depth']}")
    if deep:
        curves(panels[2], result, "depth", "peak_bytes", f"peak memory, length {settings['length']:,}")
    title(
        figure,
        result,
        f"One training step with AdamW: dim {settings['dim']}, {settings['heads']} heads, chunk "
        f"{settings['chunk']}, {settings['rounds']} rounds, {settings['dtype']}, batch 1",
    )
    save(figure, path)


def data(result: Json, path: Path) -> None:
    """Bars of the tokens read a second, and of the time to the first batch after resuming; logarithmic."""
    figure = Figure(figsize=(14, 5.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[9, 7])
    tokens_of = {int(length): count for length, count in result["tokens"].items()}
    reading = Bars("length", lambda point: tokens_of[point["size"]] / point["seconds"] / 1e6, rounded)
    resuming = Bars("resume", lambda point: point["seconds"], duration)
    log_bars(left, result, reading, "reading (million tokens/s, more is better)")
    log_bars(right, result, resuming, "first batch after resuming (less is better)")
    names = left.get_legend_handles_labels()
    figure.legend(*names, frameon=False, fontsize=9, loc="outside lower center", ncols=5)
    title(
        figure,
        result,
        f"Reading {result['settings']['bases'] >> 20} MiB of records in one process; megabase: encoded batches, "
        "peers: raw records unless encoded",
    )
    save(figure, path)


def log_bars(axes: Axes, result: Json, what: Bars, heading: str) -> None:
    """Bars on a logarithmic axis."""
    axes.set_yscale("log")
    bars(axes, result, what)
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * (high / low) ** 0.12)  # space for the values above the bars
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_title(heading, loc="left", fontsize=11)


@dataclass
class End:
    """The end of a line, in data coordinates at first and then in fractions of the axes, and its label."""

    x: float
    y: float
    text: str
    colour: str
    ours: bool


def curves(axes: Axes, result: Json, along: str, what: str, heading: str) -> None:
    """A line for each contestant, named at its end, with the reason where it ends early.

    what: "seconds" or "peak_bytes". Length is logarithmic, and so is what is drawn against it; depth is not.
    """
    here = [point for point in result["points"] if point["along"] == along]
    # A logarithmic axis names the unit at every tick, a linear one in its heading.
    values = [point[what] for point in here if point["left_out"] is None and point[what]]
    unit, unit_name = unit_of(values) if along == "depth" else (1.0, "")
    ends = []
    for name in reversed(result["contestants"]):  # ours comes first, and is drawn on top
        points = [point for point in here if point["contestant"] == name]
        drawn = [point for point in points if point["left_out"] is None and point[what]]
        if not drawn:
            continue
        x, y = [point["size"] for point in drawn], [point[what] / unit for point in drawn]
        colour, marker = style(name, result)
        ours = name == "ours"
        axes.plot(x, y, marker=marker, markersize=6, linewidth=2.8 if ours else 1.5, color=colour)
        ends.append(End(x[-1], y[-1], label_of(result["contestants"][name], points, x[-1]), colour, ours))
    states = result.get("states_bytes", {}) if along == "depth" else {}
    if states and ends:
        x, y = [int(depth) for depth in states], [value / unit for value in states.values()]
        axes.plot(x, y, linestyle="--", linewidth=1.2, color="#666666")
        ends.append(End(x[-1], y[-1], "weights, gradients,\nAdamW states (megabase)", "#666666", False))
    axes.set_title(heading if along != "depth" else f"{heading} ({unit_name})", loc="left", fontsize=11)
    axes.set_xlabel("depth (layers)" if along == "depth" else "length (tokens)")
    axes.grid(True, which="major", linewidth=0.6, color="#E4E4E4")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if ends:
        scales(axes, along, what, sorted({point["size"] for point in here}))
        name_ends(axes, ends)


def unit_of(values: Sequence[float]) -> tuple[float, str]:
    """The unit that a linear axis of bytes counts in, and its name."""
    return (GIB, "GiB") if max(values, default=0) >= 2 * GIB else (MIB, "MiB")


def label_of(label: str, points: Sequence[Json], last: int) -> str:
    """The contestant's name and, if its line ends early, why."""
    reason = next((p["left_out"] for p in points if p["size"] > last and p["left_out"]), None)
    return label if reason is None else f"{label}\n({reason.split(' (')[0].split(':')[0]})"


def scales(axes: Axes, along: str, what: str, sizes: Sequence[int]) -> None:
    """Set scales and ticks of both axes: powers of 2 for lengths and memory, of 10 for time; depth is linear."""
    if along != "depth":
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=10 if what == "seconds" else 2)
        low, high = axes.get_ylim()
        if what == "seconds" and high / low < 1e3:
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
        show = duration if what == "seconds" else storage
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: show(value)))
    else:
        axes.set_ylim(bottom=0)
    step = math.ceil(len(sizes) / 8)
    shown = sizes[::-1][::step]
    axes.set_xticks(shown, [tokens(size) for size in shown])
    axes.xaxis.set_minor_locator(NullLocator())


def name_ends(axes: Axes, ends: Sequence[End]) -> None:
    """Write labels in a column right of the axes, in the order of the lines' ends, so that none overlap."""
    to_axes = axes.transScale + axes.transLimits
    axes.autoscale_view()
    for end in ends:
        end.x, end.y = to_axes.transform((end.x, end.y))
    places = spread([end.y for end in ends], [LINE * (1 + end.text.count("\n")) for end in ends])
    for end, y in zip(ends, places, strict=True):
        axes.annotate(
            end.text,
            xy=(end.x, end.y),
            xytext=(1.04, y),
            xycoords="axes fraction",
            textcoords="axes fraction",
            color=end.colour,
            fontsize=9,
            fontweight="bold" if end.ours else "normal",
            va="center",
            arrowprops={
                "arrowstyle": "-",
                "color": end.colour,
                "linewidth": 0.9,
                "linestyle": ":",
                "alpha": 0.6,
                "shrinkB": 4,
            },
            annotation_clip=False,
        )


def spread(wanted: Sequence[float], heights: Sequence[float]) -> list[float]:
    """Centres near the wanted ones, in the same order, so far apart that labels of these heights do not overlap."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    places = list(wanted)
    for below, above in pairwise(order):
        places[above] = max(places[above], places[below] + (heights[below] + heights[above]) / 2)
    # The first pass only moves labels up. Move all of them down by half of what the top one was moved.
    if order:
        excess = (places[order[-1]] - wanted[order[-1]]) / 2
        places = [place - excess for place in places]
    return places


@dataclass(frozen=True)
class Bars:
    """What the bars of a picture are: the sweep, the height of a point's bar, and how a height is written."""

    along: str
    height: Callable[[Json], float]
    show: Callable[[float], str]


def speed_bars(axes: Axes, result: Json) -> None:
    """Tokens a second of a training step."""
    bars(axes, result, Bars("length", lambda point: point["size"] / point["seconds"], rounded))
    names = axes.get_legend_handles_labels()[1]
    axes.set_ylim(top=axes.get_ylim()[1] * (1.2 + 0.07 * len(names)))  # space for the legend
    axes.set_title("speed (tokens/s, more is better)", loc="left", fontsize=11)
    if names:
        axes.legend(frameon=False, fontsize=9, loc="upper left")


def bars(axes: Axes, result: Json, what: Bars) -> None:
    """A group for each length, a bar for each contestant, its value above it."""
    points = [p for p in result["points"] if p["along"] == what.along]
    sizes = sorted({point["size"] for point in points})
    names = [n for n in result["contestants"] if any(p["contestant"] == n and p["seconds"] for p in points)]
    width = 0.8 / max(1, len(names))
    for number, name in enumerate(names):
        timed = [p for p in points if p["contestant"] == name and p["seconds"] is not None]
        x = [sizes.index(point["size"]) + (number - (len(names) - 1) / 2) * width for point in timed]
        heights = [what.height(point) for point in timed]
        colour, _ = style(name, result)
        drawn = axes.bar(x, heights, width * 0.92, color=colour, label=result["contestants"][name])
        shown = [what.show(height) for height in heights]
        axes.bar_label(drawn, labels=shown, fontsize=8, padding=3, rotation=90)
    axes.set_xticks(range(len(sizes)), [tokens(size) for size in sizes])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: what.show(value)))
    axes.set_xlabel("length (tokens)")
    axes.grid(True, axis="y", linewidth=0.6, color="#E4E4E4")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def style(name: str, result: Json) -> tuple[str, str]:
    """Colour and marker of a contestant."""
    if name in STYLES:
        return STYLES[name]
    others = [other for other in result["contestants"] if other not in STYLES]
    return OTHERS[others.index(name) % len(OTHERS)]


def title(figure: Figure, result: Json, text: str) -> None:
    """Write above the figure what was measured, and on which machine."""
    machine = result["machine"]
    if "gpu" in machine:
        on = machine["gpu"]
    else:
        on = f"{machine['processor']}, {machine['threads']} of {machine['cores']} cores"
    figure.suptitle(f"{text}\n{on}, torch {result['versions']['torch']}", fontsize=11, x=0.01, ha="left")


def save(figure: Figure, path: Path) -> None:
    """Write the picture under another name and rename it."""
    partial = path.with_name(path.stem + ".partial.png")
    figure.savefig(partial, dpi=120)
    partial.rename(path)


def tokens(value: float) -> str:
    """4096 as 4k."""
    for unit, name in ((1 << 20, "M"), (1 << 10, "k")):
        if value >= unit and value % unit == 0:
            return f"{value // unit:.0f}{name}"
    return f"{value:,.0f}"


def rounded(value: float) -> str:
    """1234.5 as 1,234; three digits below 100."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def duration(value: float) -> str:
    """Seconds as s, ms or µs."""
    for unit, name in ((1.0, "s"), (1e-3, "ms")):
        if value >= unit * (1 - 1e-9):
            return f"{value / unit:,.3g} {name}"
    return f"{value * 1e6:,.3g} µs"


def storage(value: float) -> str:
    """Bytes as GiB or MiB."""
    return f"{value / GIB:,.3g} GiB" if value >= GIB else f"{value / MIB:,.3g} MiB"


DRAWERS = {"attention": attention, "model": model, "data": data}


def main(arguments: Sequence[str]) -> int:
    """Draw RESULT.json as PICTURE.png."""
    if len(arguments) != 2:
        sys.exit("usage: python -m megabase.pipeline.bench.draw RESULT.json PICTURE.png")
    result = json.loads(Path(arguments[0]).read_text())
    DRAWERS[result["benchmark"]](result, Path(arguments[1]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
