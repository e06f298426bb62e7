"""The pictures of a run's page: matplotlib figures from a `Record`. A picture without data is left out."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING, Any

from megabase.pipeline.inference.parts import position_bins
from megabase.pipeline.report.record import Record, is_number
from megabase.pipeline.rundir.figures import DECAY
from megabase.pipeline.rundir.journal import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, LIGHT, RED, GREEN, GREY = "#2f6690", "#a9c4d6", "#b5472f", "#4c7a34", "#555555"
DPI = 110
# Steps whose losses are drawn; of more, every so many are averaged.
POINTS = 2000


@dataclass(frozen=True)
class Picture:
    """A picture and what it shows.

    Attributes:
        name: of its file, without .png.
        title: of its section.
        text: what it shows and how to read it.
        png: the picture.
    """

    name: str
    title: str
    text: str
    png: bytes


def pictures(record: Record) -> Iterator[Picture]:
    """Draw all pictures for which the run has data, in the order of the page."""
    for draw in (_loss, _positions, _recall, _speed, _memory, _hashing, _nodes):
        if picture := draw(record):
            yield picture


Panel = Callable[["Axes"], None]
# (step, bits per base)
Points = list[tuple[int, float]]


def _picture(name: str, title: str, text: str, panels: Sequence[Panel], height: float = 3.6) -> Picture:
    """A picture of panels side by side."""
    # matplotlib's object interface, because pyplot keeps global state and looks for a display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, height), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for panel, each in zip(panels, axes, strict=True):
        panel(each)
        each.grid(color="#e6e6e6", linewidth=0.6)
        each.set_axisbelow(True)
        each.spines[["top", "right"]].set_visible(False)
    content = BytesIO()
    figure.savefig(content, dpi=DPI, format="png")
    return Picture(name, title, text, content.getvalue())


def _loss(record: Record) -> Picture | None:
    train = _averaged(
        [(row["step"], row["bits_per_base"]) for row in record.steps if is_number(row["bits_per_base"])]
    )
    if not train:
        return None
    unit, name = _unit(record.tokens_per_step * train[-1][0])
    per_hour, times = _time_unit(record.hours)

    def by_tokens(axes: Axes) -> None:
        _draw_losses(axes, record, train, lambda step: step * record.tokens_per_step / unit)
        for number, step in enumerate(record.starts[1:]):
            label = None if number else "started again"
            axes.axvline(step * record.tokens_per_step / unit, color="#bbbbbb", linewidth=0.8, label=label)
        axes.set_xlabel(f"{name}tokens")
        axes.legend(fontsize=8)

    def by_time(axes: Axes) -> None:
        _draw_losses(axes, record, train, lambda step: record.hours_at(step) * per_hour)
        axes.set_xlabel(f"{times} of training")

    text = (
        "Bits per base: 2 is guessing among four letters, lower is better. Markov models predict a base from the ones"
        " right before it; a model is worth training if it is below them. The time is that in which the run trained,"
        " without waiting in a queue."
    )
    return _picture("loss", "Loss", text, [by_tokens, by_time] if record.hours else [by_tokens])


def _draw_losses(axes: Axes, record: Record, train: Points, x: Callable[[int], float]) -> None:
    """Training, as it is and smoothed, validation and Markov models; x: the place of a step on the axis."""
    valid = [
        (row["step"], row["valid_bits_per_base"])
        for row in record.evaluations
        if is_number(row["valid_bits_per_base"])
    ]
    smoothed = _smoothed([value for _, value in train])
    places = [x(step) for step, _ in train]
    axes.plot(places, [value for _, value in train], color=LIGHT, linewidth=0.8, label="training")
    axes.plot(places, smoothed, color=BLUE, linewidth=1.2, label="training, smoothed")
    if valid:
        values = [value for _, value in valid]
        axes.plot([x(step) for step, _ in valid], values, "o-", color=RED, markersize=3, label="validation")
    markov = _markov(record)
    for order, value in markov:
        axes.axhline(value, color=GREY, linestyle=":", linewidth=1)
        place = {"xycoords": ("axes fraction", "data"), "ha": "right", "va": "bottom"}
        axes.annotate(f"Markov order {order}", (1, value), fontsize=7, color=GREY, **place)  # type: ignore[arg-type]
    # The first steps, whose losses are much higher, would flatten the rest.
    tail = [value for _, value in [*train[len(train) // 20 :], *valid, *markov]]
    axes.set_ylim(min(tail) - 0.01, min(max(tail), sorted(tail)[len(tail) // 2] + 0.3) + 0.01)
    axes.set_ylabel("bits per base")


def _positions(record: Record) -> Picture | None:
    length = record.config.data.length
    bins = position_bins(length)
    rows = [row for row in record.evaluations if "valid_from_0_bits_per_base" in row]
    if not rows:
        return None

    def panel(axes: Axes) -> None:
        shown = [(rows[-1], BLUE, f"step {rows[-1]['step']:,}")]
        if len(rows) > 1:
            shown.insert(0, (rows[0], LIGHT, f"step {rows[0]['step']:,}"))
        for row, color, label in shown:
            known = [(start, end, row.get(f"valid_from_{start}_bits_per_base")) for start, end in bins]
            drawn = [((start + end) / 2, value) for start, end, value in known if is_number(value)]
            axes.plot(*zip(*drawn, strict=True), "o-", color=color, markersize=4, label=label)
        for order, value in _markov(record)[-1:]:
            axes.axhline(value, color=GREY, linestyle=":", linewidth=1, label=f"Markov order {order}")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.set_xlabel("position in the window")
        axes.set_ylabel("bits per base")
        axes.legend(fontsize=8)

    text = (
        "What a base costs by its position in a validation window. If the model uses its context, later positions,"
        " which have more of it, cost less."
    )
    return _picture("positions", "Use of the context", text, [panel])


def _recall(record: Record) -> Picture | None:
    rows = [row for row in record.evaluations if is_number(row.get("valid_recall_bits"))]
    if not rows:
        return None

    def panel(axes: Axes) -> None:
        axes.plot(
            [row["step"] for row in rows],
            [row["valid_recall_bits"] for row in rows],
            "o-",
            color=GREEN,
            markersize=4,
        )
        axes.axhline(0, color=GREY, linewidth=0.8)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("bits per base gained")

    text = (
        "How much less a stretch of bases costs if it came before in the window: 0 if the model does not recall it,"
        " almost 2 if it copies it without a mistake."
    )
    return _picture("recall", "Recall", text, [panel])


def _speed(record: Record) -> Picture | None:
    rows = record.speeds
    if not rows:
        return None
    per_hour, times = _time_unit(record.hours)
    hours = [row["hours"] * per_hour for row in rows]

    def tokens(axes: Axes) -> None:
        axes.plot(hours, [row["tokens_per_second"] for row in rows], color=BLUE, linewidth=1)
        axes.set_ylim(bottom=0)
        axes.set_xlabel(f"{times} of training")
        axes.set_ylabel("tokens per second, all ranks")

    def shares(axes: Axes) -> None:
        for name, color, label in (
            ("mfu", BLUE, "MFU"),
            ("hfu", LIGHT, "HFU"),
            ("data_wait", RED, "waiting for data"),
        ):
            known = [
                (hour, 100 * row[name])
                for hour, row in zip(hours, rows, strict=True)
                if is_number(row.get(name))
            ]
            if known:
                axes.plot(*zip(*known, strict=True), color=color, linewidth=1, label=label)
        axes.set_ylim(bottom=0)
        axes.set_xlabel(f"{times} of training")
        axes.set_ylabel("%")
        axes.legend(fontsize=8)

    text = (
        "Tokens per second of all ranks together, evaluations and checkpoints aside. MFU is the share of the devices'"
        " peak that the model's own arithmetic takes; HFU counts what a reversible model computes twice as well."
    )
    return _picture("speed", "Speed", text, [tokens, shares])


def _memory(record: Record) -> Picture | None:
    if not record.speeds:
        return None
    per_hour, times = _time_unit(record.hours)

    def panel(axes: Axes) -> None:
        def draw(rows: list[Row], name: str, style: str, color: str, label: str) -> None:
            values = [row[name] / 2**30 for row in rows]
            axes.plot(
                [row["hours"] * per_hour for row in rows],
                values,
                style,
                markersize=3,
                color=color,
                label=label,
            )

        draw(record.speeds, "peak_memory_bytes", "-", BLUE, "rank 0")
        if record.measured:
            draw(record.measured, "rank_memory_bytes_most", "o", RED, "the rank with the most")
            draw(record.measured, "rank_memory_bytes_least", "o", LIGHT, "the rank with the least")
        axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
        axes.set_xlabel(f"{times} of training")
        axes.set_ylabel("GiB")
        axes.legend(fontsize=8)

    text = "The peak of each start so far: on the device, or of the process if a run trains on CPUs."
    return _picture("memory", "Memory", text, [panel], height=3.0)


def _hashing(record: Record) -> Picture | None:
    rows = record.measured
    layers = sorted(
        {int(found[1]) for row in rows for key in row if (found := re.fullmatch(r"lsh_(\d+)_balance", key))}
    )
    if not layers:
        return None

    def panel_of(name: str, label: str) -> Panel:
        def panel(axes: Axes) -> None:
            for number, layer in enumerate(layers):
                known = [
                    (row["step"], row[f"lsh_{layer}_{name}"])
                    for row in rows
                    if is_number(row.get(f"lsh_{layer}_{name}"))
                ]
                if known:
                    shade = 0.25 + 0.6 * number / max(len(layers) - 1, 1)
                    axes.plot(
                        *zip(*known, strict=True),
                        "o-",
                        markersize=3,
                        color=_blues(shade),
                        label=f"layer {layer}",
                    )
            axes.set_ylim(bottom=0)
            axes.set_xlabel("optimizer step")
            axes.set_title(label, fontsize=9)
            if len(layers) <= 12:
                axes.legend(fontsize=7)

        return panel

    text = (
        "How the LSH layers hash, on one validation batch. Balance: 1 if all buckets are equally full. Unmatched: the"
        " share of positions that find no key in any round. Truncated: the share of positions whose bucket has more"
        " earlier positions than one can reach (model.lsh.chunk_length). A layer whose balance falls or whose truncated"
        " share rises misses keys: more buckets (model.lsh.n_buckets) or a longer chunk_length help."
    )
    panels = [panel_of(name, name) for name in ("balance", "unmatched", "truncated")]
    return _picture("hashing", "LSH attention", text, panels)


def _nodes(record: Record) -> Picture | None:
    nodes = {name: rows for name, rows in record.nodes.items() if rows}
    if not nodes:
        return None
    begin = min(rows[0]["time"] for rows in nodes.values())
    seconds = max(rows[-1]["time"] for rows in nodes.values()) - begin
    per_hour, times = _time_unit(seconds / 3600)

    def panel_of(label: str, value: Callable[[dict[str, Any]], float | None]) -> Panel:
        def panel(axes: Axes) -> None:
            for number, (name, rows) in enumerate(nodes.items()):
                known = [
                    ((row["time"] - begin) / 3600 * per_hour, found)
                    for row in rows
                    if (found := value(row)) is not None
                ]
                if known:
                    shade = 0.3 + 0.6 * number / max(len(nodes) - 1, 1)
                    axes.plot(*zip(*known, strict=True), linewidth=1, color=_blues(shade), label=name)
            axes.set_ylim(0, 105)
            axes.set_xlabel(f"{times} since the run began")
            axes.set_title(label, fontsize=9)
            if len(nodes) <= 8:
                axes.legend(fontsize=7)

        return panel

    def gpus(row: dict[str, Any]) -> float | None:
        values = [value for key, value in row.items() if re.fullmatch(r"gpu_\d+_percent", key)]
        return sum(values) / len(values) if values else None

    panels = [
        panel_of("CPUs, %", lambda row: row.get("cpu_percent")),
        panel_of("memory, %", lambda row: row.get("memory_percent")),
    ]
    if any(gpus(row) is not None for rows in nodes.values() for row in rows):
        panels.insert(0, panel_of("GPUs, % of the time", gpus))
    text = "Load of every node while it trained. A node that differs from the others slows all of them down."
    return _picture("nodes", "Nodes", text, panels, height=3.0)


def _markov(record: Record) -> list[tuple[int, float]]:
    """(order, bits per base) of the Markov models that are drawn: order 0, and the best."""
    if not record.evaluations:
        return []
    row = record.evaluations[-1]
    known = {
        int(found[1]): row[key]
        for key in row
        if (found := re.fullmatch(r"markov_(\d+)_bits_per_base", key)) and is_number(row[key])
    }
    if not known:
        return []
    best = min(known, key=lambda order: known[order])
    return [(order, known[order]) for order in sorted({0, best} & known.keys())]


def _averaged(points: Points) -> Points:
    """At most POINTS points: the last step and mean of every group of neighbours."""
    if not points:
        return []
    size = -(-len(points) // POINTS)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]


def _smoothed(values: list[float]) -> list[float]:
    """Exponential means. Early ones are means of the few values before them, not close to the first."""
    sums = itertools.accumulate(values, lambda total, new: DECAY * total + new, initial=0.0)
    weights = itertools.accumulate(values, lambda total, _: DECAY * total + 1, initial=0.0)
    return [total / weight for total, weight in zip(sums, weights, strict=True) if weight]


def _unit(tokens: int) -> tuple[float, str]:
    """A unit in which a number of tokens is read well."""
    for size, name in ((1e9, "billion "), (1e6, "million ")):
        if tokens >= size:
            return size, name
    return 1.0, ""


def _time_unit(hours: float) -> tuple[float, str]:
    """A unit in which a span of hours is read well: how many of them are in an hour, and its name."""
    if hours < 0.1:
        return 3600.0, "seconds"
    if hours < 5:
        return 60.0, "minutes"
    return (1.0, "hours") if hours < 120 else (1 / 24, "days")


def _blues(share: float) -> Any:
    from matplotlib import colormaps

    return colormaps["viridis"](share)
