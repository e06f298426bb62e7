"""The outcome of a benchmark, as JSON that names the machine, the versions and every sample."""

from __future__ import annotations

import datetime
import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import psutil
import torch

from megabase.pipeline.bench import contest, peers
from megabase.pipeline.bench.contest import OURS, Point
from megabase.pipeline.rundir import environment

PACKAGES = ("torch", "triton", *peers.PACKAGES, "numpy")

Json = dict[str, Any]


@dataclass
class Result:
    """The result of a benchmark. settings: of the task. labels: of the contestants, by name. points: by what varies.

    parameters: of the contestants. states_bytes: of our weights, gradients and optimizer states, by depth.
    tokens: that a call reads, by length; empty if it reads `length` tokens. packages: their versions are recorded.
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
        """1 if a contestant of megabase failed that should have run, else 0."""
        ours = [p for points in self.points.values() for p in points if p.contestant.startswith(OURS)]
        return int(any(point.left_out is not None and point.left_out.failed for point in ours))

    def as_json(self) -> Json:
        """Everything as plain values, in seconds, bytes and tokens."""
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
    """The content of environment.json, cached because it starts git."""
    return environment.describe()


def machine(device: str) -> Json:
    """The machine: processor, cores, threads of torch, memory in bytes; on a GPU its name and memory as well."""
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
    """Versions of Python, megabase and `packages`, and of CUDA if torch has it."""
    found = {name: described()["versions"][name] for name in ("python", "megabase")}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found
