"""The tables of a benchmark's outcome."""

from __future__ import annotations

from collections.abc import Callable

import torch
from rich.table import Table

from megabase.pipeline.bench import contest
from megabase.pipeline.bench.contest import OURS, Point
from megabase.pipeline.bench.result import Result, machine
from megabase.pipeline.bench.units import memory, seconds
from megabase.pipeline.readable import counted
from megabase.pipeline.tables import new_table, show


def attention_table(result: Result) -> None:
    """Print time and memory at every length."""
    settings = result.settings
    title = (
        f"One attention layer's core, forward + backward, causal, {settings['heads']} heads of "
        f"{settings['head_dim']}, chunk {settings['chunk']}, {settings['rounds']} rounds, {settings['dtype']}"
    )
    table = _table("length")
    _fill(table, result, "length")
    show(title, table, _machine_line(settings["device"]), *fastest_exact(result))


def fastest_exact(result: Result) -> list[str]:
    """A line for each length at which several of torch's exact kernels ran: the fastest of them."""
    points = [p for p in result.points["length"] if p.contestant.startswith("sdpa") and p.samples]
    lines = []
    for size in dict.fromkeys(point.size for point in points):
        here = [p for p in points if p.size == size and p.left_out is None]
        if len(here) > 1:
            best = min(here, key=lambda point: point.seconds or 0.0)
            against = contest.ratio(result.points["length"], best, OURS)
            ratio = "" if against is None else f", {against:.2f} × ours"
            lines.append(
                f"fastest exact at {size:,}: {result.labels[best.contestant]}, {seconds(best.seconds)}{ratio}"
            )
    return lines


def model_tables(result: Result) -> None:
    """Print the training step, memory against depth, and the longest context."""
    settings = result.settings
    shape = (
        f"dim {settings['dim']}, {settings['heads']} heads, chunk {settings['chunk']}, "
        f"{settings['rounds']} rounds, {settings['dtype']}, batch 1"
    )
    if settings["sequence_ranks"] > 1:
        shape += (
            f", one of {settings['sequence_ranks']} ranks that share each sequence, without communication"
        )
    table = _table("length")
    table.add_column("tokens/s", justify="right")
    table.add_column("parameters", justify="right")
    _fill(table, result, "length", model_columns(result))
    show(f"One training step (forward, backward, AdamW), depth {settings['depth']}, {shape}", table)
    if result.points.get("depth"):
        title = f"\nPeak memory against depth, length {settings['length']:,}, {shape}"
        show(title, _memory_table(result, "depth"))
    if result.points.get("longest"):
        title = f"\nPeak memory and time of one step, doubling the length, depth {settings['depth']}, {shape}"
        show(title, _memory_table(result, "longest"))
    show(_machine_line(settings["device"]))


def data_tables(result: Result) -> None:
    """Print how many tokens are read a second, and the time to the first batch after resuming."""
    mebibytes = result.settings["bases"] >> 20
    batches = ", ".join(f"{n} × {length:,}" for length, n in result.settings["micro_batch"].items())
    show(
        f"Reading {mebibytes} MiB of records of each length, one process, files in memory; megabase: encoded "
        f"training batches of {batches}; peers: raw records, unless encoded",
        _reading_table(result, "length", "M tokens/s", lambda point, s: f"{rate(result, point, s):,.0f}"),
        "\nTime to the first batch after resuming in the middle of the epoch, with a new loader",
        _reading_table(result, "resume", "median", lambda point, s: seconds(s)),
        _machine_line(result.settings["device"]),
    )


def rate(result: Result, point: Point, call_s: float) -> float:
    """Million tokens a second of a call at the point that took so many seconds."""
    return result.tokens[point.size] / call_s / 1e6


def _reading_table(result: Result, along: str, what: str, show: Callable[[Point, float], str]) -> Table:
    """A row for each length and contestant; `show` gives a cell for a point and a call's seconds."""
    points = result.points.get(along, [])
    table = new_table()
    for heading in ("length", "contestant", what, "fastest – slowest", "time, × ours"):
        table.add_column(heading, justify="left" if heading == "contestant" else "right")
    if any(point.left_out for point in points):
        table.add_column("left out")
    for size in dict.fromkeys(point.size for point in points):
        here = [point for point in points if point.size == size]
        for point in here:
            cells = [f"{size:,}" if point is here[0] else "", result.labels[point.contestant]]
            if point.left_out or point.seconds is None:
                table.add_row(*cells, "–", "", "", point.left_out.text if point.left_out else "")
                continue
            against = contest.ratio(points, point, OURS)
            table.add_row(
                *cells,
                show(point, point.seconds),
                f"{show(point, min(point.samples))} – {show(point, max(point.samples))}",
                "" if against is None else f"{against:,.2f}",
            )
        table.add_section()
    return table


def model_columns(result: Result) -> Callable[[Point], list[str]]:
    """tokens/s and parameters of a point."""

    def columns(point: Point) -> list[str]:
        count = result.parameters.get(point.contestant)
        speed = "" if point.left_out or not point.seconds else f"{point.size / point.seconds:,.0f}"
        return [speed, "" if count is None else f"{count / 1e6:.2f} M"]

    return columns


def _table(size: str) -> Table:
    table = new_table()
    table.add_column(size, justify="right")
    table.add_column("contestant")
    table.add_column("median", justify="right")
    table.add_column("least – most", justify="right")
    table.add_column("× ours", justify="right")
    table.add_column("peak memory", justify="right")
    return table


def _fill(
    table: Table, result: Result, along: str, more: Callable[[Point], list[str]] = lambda point: []
) -> None:
    points = result.points[along]
    if any(point.left_out for point in points):
        table.add_column("left out")
    for size in dict.fromkeys(point.size for point in points):
        here = [point for point in points if point.size == size]
        for point in here:
            first = f"{size:,}" if point is here[0] else ""
            cells = [first, result.labels[point.contestant]]
            if point.left_out:
                table.add_row(*cells, "–", "", "", "", *more(point), point.left_out.text)
                continue
            against = contest.ratio(points, point, OURS)
            table.add_row(
                *cells,
                seconds(point.seconds),
                f"{seconds(min(point.samples))} – {seconds(max(point.samples))}",
                "" if against is None else f"{against:.2f}",
                memory(point.peak_bytes),
                *more(point),
            )
        table.add_section()


def _memory_table(result: Result, along: str) -> Table:
    """A row for each size, a column for each contestant."""
    points = result.points[along]
    names = list(dict.fromkeys(point.contestant for point in points))
    table = new_table()
    table.add_column("depth" if along == "depth" else "length", justify="right")
    for name in names:
        table.add_column(result.labels[name], justify="right")
    for size in sorted({point.size for point in points}):
        cells = {point.contestant: point for point in points if point.size == size}
        table.add_row(
            f"{size:,}", *(_memory_cell(cells.get(name), timed=along == "longest") for name in names)
        )
    return table


def _memory_cell(point: Point | None, *, timed: bool) -> str:
    if point is None:
        return ""
    if point.left_out:
        return point.left_out.text
    return memory(point.peak_bytes) + (f", {seconds(point.seconds)}" if timed else "")


def _machine_line(device: str) -> str:
    on = machine(device)
    if "gpu" in on:
        return f"{on['gpu']}, torch {torch.__version__}"
    threads = counted(on["threads"], "thread")
    return f"{on['processor']}, {on['cores']} cores, {threads}, torch {torch.__version__}"
