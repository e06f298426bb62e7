"""What came out: as tables, and as JSON that names the machine, the versions, and every sample."""

from __future__ import annotations

import datetime
import functools
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
from rich import box
from rich.console import Console
from rich.table import Table

from megabase.pipeline.bench import contest, peers
from megabase.pipeline.bench.contest import Point
from megabase.pipeline.errors import UserError
from megabase.pipeline.rundir import environment

logger = logging.getLogger(__name__)

OURS = "ours"
"""The contestant that the others are measured against."""

PACKAGES = ("torch", "triton", *peers.PACKAGES, "numpy")

Json = dict[str, Any]


@dataclass
class Result:
    """A benchmark's outcome. settings: of the task. labels: of the contestants, by name. points: by what varies.

    parameters: of the contestants. states_bytes: of our weights, gradients and optimizer states, by depth.
    tokens: that a call reads, by length, where that is not the length. packages: whose versions matter.
    """

    benchmark: str
    settings: Json
    labels: dict[str, str]
    points: dict[str, list[Point]] = field(default_factory=dict)
    parameters: dict[str, int] = field(default_factory=dict)
    states_bytes: dict[int, int] = field(default_factory=dict)
    tokens: dict[int, int] = field(default_factory=dict)
    packages: Sequence[str] = PACKAGES
    date: str = field(
        default_factory=lambda: datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    )

    def add(self, along: str, points: Sequence[Point]) -> None:
        """Add points of a sweep along `along`."""
        self.points.setdefault(along, []).extend(points)

    def exit_code(self) -> int:
        """1 if one of ours failed where it should have run."""
        ours = [p for points in self.points.values() for p in points if p.contestant.startswith(OURS)]
        return int(any(point.left_out is not None and point.left_out.failed for point in ours))

    def as_json(self) -> Json:
        """Everything, as plain values. Seconds, bytes, tokens."""
        return {
            "benchmark": self.benchmark,
            "date": self.date,
            "settings": self.settings,
            "machine": machine(self.settings["device"]),
            "versions": versions(self.packages),
            "commit": described()["commit"] or os.environ.get("MEGABASE_COMMIT"),
            "contestants": self.labels,
            **({"parameters": self.parameters} if self.parameters else {}),
            **({"states_bytes": self.states_bytes} if self.states_bytes else {}),
            **({"tokens": self.tokens} if self.tokens else {}),
            "points": [
                self._point(along, point) for along, points in self.points.items() for point in points
            ],
        }

    def _point(self, along: str, point: Point) -> Json:
        timed = bool(point.samples) and point.left_out is None
        return {
            "along": along,
            "size": point.size,
            "contestant": point.contestant,
            "seconds": point.seconds if timed else None,
            "least": min(point.samples) if timed else None,
            "most": max(point.samples) if timed else None,
            "against_ours": contest.ratio(self.points[along], point, OURS) if timed else None,
            "samples": point.samples,
            "probe_seconds": None if point.probe is None else point.probe.seconds,
            "peak_bytes": point.peak_bytes,
            "left_out": None if point.left_out is None else point.left_out.text,
        }


@functools.cache
def described() -> Json:
    """environment.json's content, asked for once: it starts git, and does not change."""
    return environment.describe()


def machine(device: str) -> Json:
    """The machine: processor, cores, threads of torch, memory; on a GPU also that."""
    found: Json = {
        "processor": described()["processor"],
        "cores": described()["cpus"],
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "platform": described()["platform"],
    }
    if device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
        found["gpu_memory_bytes"] = torch.cuda.get_device_properties(0).total_memory
    return found


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Of Python, megabase and `packages`."""
    found = {name: described()["versions"][name] for name in ("python", "megabase")}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


@dataclass(frozen=True)
class Files:
    """Where the outcome goes; None: nowhere."""

    json: Path | None
    picture: Path | None

    @classmethod
    def of(cls, json: Path | None, picture: Path | None) -> Files:
        """The picture goes beside the JSON unless told otherwise. Raises UserError for a path that cannot be
        written: now, not after minutes of work."""
        if picture is None and json is not None:
            picture = json.with_suffix(".png")
        if picture is not None and picture.suffix != ".png":
            raise UserError(f"--picture {picture}: the name must end in .png")
        if json is not None and json == picture:
            raise UserError(f"--json {json} and --picture are one file: give the JSON another name")
        for option, path in (("--json", json), ("--picture", picture)):
            if path is not None:
                check_writable(option, path)
        return cls(json, picture)

    def collect(self, result: Result, along: str) -> Callable[[Sequence[Point]], None]:
        """What takes the points of a contest as they come: into `result`, on the screen, and into the JSON."""

        def add(points: Sequence[Point]) -> None:
            result.add(along, points)
            say(points, result)
            self.write_json(result)

        return add

    def write_json(self, result: Result) -> None:
        """After every size: what is killed later leaves what it has."""
        if self.json is not None:
            partial = self.json.with_name(self.json.name + ".partial")
            partial.write_text(json.dumps(result.as_json(), indent=1) + "\n")
            partial.rename(self.json)

    def write_picture(self, result: Result, draw: Callable[[Json, Path], None]) -> None:
        """Draw the outcome."""
        if self.picture is not None:
            draw(result.as_json(), self.picture)


def check_writable(option: str, path: Path) -> None:
    """Raise UserError unless a file can be made or written at `path`; none is left there."""
    existed = path.exists()
    try:
        with path.open("a"):
            pass
    except OSError as error:
        raise UserError(f"{option} {path}: cannot be written ({error.strerror})") from None
    if not existed:
        path.unlink()


def say(points: Sequence[Point], result: Result) -> None:
    """One line on stderr: somebody may be waiting."""
    size = f"{points[0].size:,}"
    told = "; ".join(
        f"{result.labels[p.contestant]} {p.left_out.text if p.left_out else seconds(p.seconds)}"
        for p in points
    )
    logger.info(f"{size}: {told}")


def attention_table(result: Result) -> None:
    """Print time and memory at every length."""
    settings = result.settings
    title = (
        f"One attention layer's core, forward + backward, causal, {settings['heads']} heads of "
        f"{settings['head_dim']}, chunk {settings['chunk']}, {settings['rounds']} rounds, {settings['dtype']}"
    )
    table = _table("length")
    _fill(table, result, "length")
    _print(title, table, _machine_line(settings["device"]), *fastest_exact(result))


def fastest_exact(result: Result) -> list[str]:
    """Where several of torch's exact kernels ran: which was faster, at every length."""
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
    table = _table("length")
    table.add_column("tokens/s", justify="right")
    table.add_column("parameters", justify="right")
    _fill(table, result, "length", model_columns(result))
    _print(f"One training step (forward, backward, AdamW), depth {settings['depth']}, {shape}", table)
    if result.points.get("depth"):
        title = f"\nPeak memory against depth, length {settings['length']:,}, {shape}"
        _print(title, _memory_table(result, "depth"))
    if result.points.get("longest"):
        title = f"\nPeak memory and time of one step, doubling the length, depth {settings['depth']}, {shape}"
        _print(title, _memory_table(result, "longest"))
    _print(_machine_line(settings["device"]))


def data_tables(result: Result) -> None:
    """Print what is read a second, and the time to the first batch after resuming."""
    mebibytes = result.settings["bases"] >> 20
    batches = ", ".join(f"{n} × {length:,}" for length, n in result.settings["micro_batch"].items())
    _print(
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
    table = Table(box=_box())
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
    table = Table(box=_box())
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
    table = Table(box=_box())
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
    threads = f"{on['threads']} thread{'s' * (on['threads'] > 1)}"
    return f"{on['processor']}, {on['cores']} cores, {threads}, torch {torch.__version__}"


def _box() -> box.Box | None:
    return box.SIMPLE_HEAD if sys.stdout.isatty() else None


def _print(*things: Table | str) -> None:
    # Without a terminal there is no width to fit into: lines are as long as they need to be.
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    for thing in things:
        console.print(thing)


def seconds(value: float | None) -> str:
    """Three digits, in s or ms."""
    if value is None:
        return ""
    return (
        f"{value:.3g} s"
        if 1.0 <= value < 1000
        else f"{value:,.0f} s"
        if value >= 1000
        else f"{value * 1e3:.3g} ms"
    )


def memory(value: int | None) -> str:
    """MiB, or GiB from there on."""
    if value is None:
        return ""
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"
