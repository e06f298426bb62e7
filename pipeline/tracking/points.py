"""The journal's numbers as points for MLflow: (metric, step) once, with the time of the step.

MLflow stores a point once however often it arrives, if name, value, step and time are the same. So the time of a point
must not be that of sending: a batch whose answer was lost is sent again. Times are in `performance.jsonl`, because
`metrics.jsonl` must be the same for an interrupted and an uninterrupted run. A step that is trained again keeps the
point and the time of its first pass.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from megabase.pipeline.rundir.journal import Row, Tail
from megabase.pipeline.rundir.paths import RunPaths
from megabase.pipeline.tracking.names import metrics_of, system_name

# Of a row: where, when and from what, not a measurement.
NOT_METRICS = ("step", "samples", "time", "started", "step_times")
# The bits per base of Markov models do not change, so they are lines in loss.png, not metrics.
MARKOV = ("markov_", "full_markov_")


class Point(NamedTuple):
    """A value of a metric.

    Attributes:
        name: of the metric.
        value: of it.
        ms: time of the step, in milliseconds since 1970.
        step: of the optimizer; of a node's measurement its number.
    """

    name: str
    value: float
    ms: int
    step: int


class StepTimes:
    """When each step was done, from the rows of `performance.jsonl` in their order. The first time of a step counts."""

    def __init__(self) -> None:
        self._ms = array("q", [0])

    @property
    def reached(self) -> int:
        """The last step with a time, -1 if there is none."""
        return len(self._ms) - 1 if self._ms[-1] else -1

    def of(self, step: int) -> int | None:
        """Time of a step, in milliseconds since 1970; None if it is not known yet."""
        return self._ms[step] if 0 <= step <= self.reached else None

    def add(self, row: Row) -> None:
        """Note the times in a row. Steps of which none is known get that of the next row."""
        times = row.get("step_times") or []
        last = int(row["step"])
        first = last + 1 - len(times)
        if "time" not in row:
            return
        otherwise = milliseconds(row["time"])
        for step in range(self.reached + 1, last + 1):
            ms = milliseconds(times[step - first]) if step >= first else otherwise
            if step < len(self._ms):
                self._ms[step] = ms  # step 0
            else:
                self._ms.append(ms)


class Points:
    """Reads the two journals of a run directory as they grow.

    Args:
        directory: the run directory.
    """

    def __init__(self, directory: Path) -> None:
        self._paths = RunPaths(directory)
        self._times = StepTimes()
        # Of each metric, the last step that was returned, or that MLflow has.
        self._last: dict[str, int] = {}
        self._nodes: dict[Path, Tail] = {}
        self._rewind()

    def _rewind(self) -> None:
        self._metrics = Tail(self._paths.metrics)
        self._performance = Tail(self._paths.performance)
        self._untimed: list[Row] = []
        self._starts = 0

    @property
    def restarts(self) -> int:
        """How often the run was started again."""
        return max(self._starts - 1, 0)

    def time_of(self, step: int) -> int | None:
        """When a step was done, in milliseconds since 1970; None if it is not known."""
        return self._times.of(step)

    def skip(self, last: dict[str, int]) -> None:
        """Do not return points up to these steps: MLflow has them. last: {metric: step}."""
        for name, step in last.items():
            self._last[name] = max(step, self._last.get(name, -1))

    def new(self, *, complete: bool) -> list[Point]:
        """The points that were not returned before, the lowest step first.

        Args:
            complete: no further rows will come, so points whose time is unknown get the present one. Otherwise they
                are returned once `performance.jsonl` has their time.
        """
        if self._metrics.was_rewritten() or self._performance.was_rewritten():
            self._rewind()
        # First the metrics: what the other file says of their times may come later, never earlier.
        self._untimed += self._metrics.new()
        found: list[Point] = []
        for row in self._performance.new():
            self._times.add(row)
            self._starts += bool(row.get("started"))
            if "time" in row and not row.get("started"):
                found += self._unseen(row | {"restarts": self.restarts}, milliseconds(row["time"]))
        waiting = []
        for row in self._untimed:
            ms = self._times.of(row["step"])
            if ms is None and complete:
                ms = milliseconds(time.time())
            if ms is None:
                waiting.append(row)
            else:
                found += self._unseen(row, ms)
        self._untimed = waiting
        found += self._of_nodes()
        return sorted(found, key=lambda point: point.step)

    def _unseen(self, row: Row, ms: int) -> Iterator[Point]:
        """The points of a row that neither this nor MLflow had yet."""
        # Only the loss of predicting letters has a perplexity.
        finetuned = self._paths.finetune.exists()
        for name, value in row.items():
            if name in NOT_METRICS or name.startswith(MARKOV) or not isinstance(value, int | float):
                continue
            for metric, number in metrics_of(name, float(value)):
                if finetuned and metric.endswith("perplexity"):
                    continue
                if row["step"] > self._last.get(metric, -1):
                    self._last[metric] = row["step"]
                    yield Point(metric, number, ms, row["step"])

    def _of_nodes(self) -> Iterator[Point]:
        """New points of the files of nodes. Their step is the number of the measurement, as in MLflow's own monitor."""
        for path in sorted(self._paths.logs.glob("system-*.jsonl")):
            node = path.stem.removeprefix("system-")
            for row in self._nodes.setdefault(path, Tail(path)).new():
                for name, value in row.items():
                    metric = system_name(node, name)
                    if name in ("sample", "time") or row["sample"] <= self._last.get(metric, -1):
                        continue
                    self._last[metric] = row["sample"]
                    yield Point(metric, float(value), milliseconds(row["time"]), row["sample"])


def milliseconds(seconds: float) -> int:
    """MLflow's unit of time."""
    return round(seconds * 1000)
