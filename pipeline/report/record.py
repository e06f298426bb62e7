"""What a run directory says of a run, read once, in the form in which pictures and the page need it."""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from megabase.pipeline.config.load import load
from megabase.pipeline.config.schema import RunConfig
from megabase.pipeline.errors import UserError
from megabase.pipeline.files import read_object
from megabase.pipeline.rundir.journal import Row, read
from megabase.pipeline.rundir.paths import RunPaths
from megabase.pipeline.rundir.view import check_run_directory


@dataclass(frozen=True)
class Record:
    """One run.

    Attributes:
        directory: the run directory.
        config: the settings of its last start.
        environment: of its last start, see `rundir/environment.py`; empty if it was not written.
        steps: rows of optimizer steps, from metrics.jsonl.
        evaluations: rows of evaluations, from metrics.jsonl.
        performance: all rows of performance.jsonl, `with_hours`.
        nodes: rows of `logs/system-NODE.jsonl`, by node.
    """

    directory: Path
    config: RunConfig
    environment: Row
    steps: list[Row]
    evaluations: list[Row]
    performance: list[Row]
    nodes: dict[str, list[Row]] = field(default_factory=dict)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of the global batch."""
        return self.config.data.global_batch * self.config.data.length

    @property
    def speeds(self) -> list[Row]:
        """The measurements of speed."""
        return [row for row in self.performance if "tokens_per_second" in row]

    @property
    def measured(self) -> list[Row]:
        """What evaluations measured of the model and the ranks."""
        return [row for row in self.performance if "rank_memory_bytes_most" in row]

    @property
    def checkpoints(self) -> list[Row]:
        """The checkpoints that were published."""
        return [row for row in self.performance if "checkpoint_bytes" in row]

    @property
    def starts(self) -> list[int]:
        """The step at which each start began."""
        return [row["step"] for row in self.performance if row.get("started")]

    @property
    def best(self) -> Row | None:
        """The evaluation with the lowest loss; None if there is none."""
        known = [row for row in self.evaluations if is_number(row.get("valid_loss"))]
        return min(known, key=lambda row: float(row["valid_loss"]), default=None)

    @property
    def hours(self) -> float:
        """Hours of training."""
        return float(self.performance[-1]["hours"]) if self.performance else 0.0

    def hours_at(self, step: int) -> float:
        """Hours of training until a step ended for the last time, between measurements interpolated."""
        steps, hours = self._marks
        place = bisect_right(steps, step)
        if place in (0, len(steps)):
            return hours[max(place - 1, 0)] if steps else 0.0
        share = (step - steps[place - 1]) / (steps[place] - steps[place - 1])
        return hours[place - 1] * (1 - share) + hours[place] * share

    @cached_property
    def _marks(self) -> tuple[list[int], list[float]]:
        """The measured steps, rising, and the hours at which each was last measured."""
        last = {row["step"]: float(row["hours"]) for row in self.performance}
        steps = sorted(last)
        return steps, list(itertools.accumulate((last[step] for step in steps), max))


def with_hours(rows: list[Row]) -> list[Row]:
    """Rows of performance.jsonl with `hours`, the hours of training until then.

    The time between two starts, in which the run waited, does not count. Steps that were trained twice took both times.
    """
    found, hours = [], 0.0
    for before, row in itertools.pairwise([{}, *rows]):
        if before and not row.get("started"):
            hours += max(row["time"] - before["time"], 0.0) / 3600
        found.append(row | {"hours": hours})
    return found


def read_run(directory: Path) -> Record:
    """Read a run.

    Raises:
        UserError: it is not a run directory, it has no settings yet, or a file in it cannot be read.
    """
    check_run_directory(directory)
    paths = RunPaths(directory)
    if not paths.config.exists():
        raise UserError(f"{directory}: the run has not started yet, so there is nothing to report")
    config = load([paths.config])
    try:
        metrics, performance = list(read(paths.metrics)), list(read(paths.performance))
        nodes = {
            path.stem.removeprefix("system-"): list(read(path, key="sample"))
            for path in sorted(paths.logs.glob("system-*.jsonl"))
        }
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}") from None
    if any("bits_per_base" not in row for row in metrics if "loss" in row):
        raise UserError(f"{directory}: a fine-tuning, which has no report: see {paths.result}")
    return Record(
        directory,
        config,
        read_object(paths.environment),
        [row for row in metrics if "loss" in row],
        [row for row in metrics if "valid_loss" in row],
        with_hours([row for row in performance if is_number(row.get("time"))]),
        nodes,
    )


def is_number(value: Any) -> bool:
    """Whether a value of a row is a finite number: the journal writes NaN as a string."""
    return isinstance(value, int | float) and math.isfinite(value)
