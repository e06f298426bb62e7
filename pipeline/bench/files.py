"""Where a benchmark writes its outcome while it runs: JSON, a picture, and a line on stderr for each size."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megabase.pipeline.bench.contest import Point
from megabase.pipeline.bench.result import Json, Result
from megabase.pipeline.bench.units import seconds
from megabase.pipeline.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Files:
    """Where the result is written; None: not at all."""

    json: Path | None
    picture: Path | None

    @classmethod
    def of(cls, json: Path | None, picture: Path | None) -> Files:
        """Files at these paths; by default the picture is written beside the JSON.

        Raises:
            UserError: a path cannot be written. Known now, before minutes of measuring.
        """
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
        """A function that takes points as they are measured, adds them to `result`, logs them and writes the JSON."""

        def add(points: Sequence[Point]) -> None:
            result.add(along, points)
            log_points(points, result)
            self.write_json(result)

        return add

    def write_json(self, result: Result) -> None:
        """Write the JSON. Called after every size, so that a benchmark that is killed leaves its results so far."""
        if self.json is not None:
            partial = self.json.with_name(self.json.name + ".partial")
            partial.write_text(json.dumps(result.as_json(), indent=1) + "\n")
            partial.rename(self.json)

    def write_picture(self, result: Result, draw: Callable[[Json, Path], None]) -> None:
        """Draw the picture, if one is wanted."""
        if self.picture is not None:
            draw(result.as_json(), self.picture)


def check_writable(option: str, path: Path) -> None:
    """Raise UserError unless `path` can be written. Leaves no new file."""
    existed = path.exists()
    try:
        with path.open("a"):
            pass
    except OSError as error:
        raise UserError(f"{option} {path}: cannot be written ({error.strerror})") from None
    if not existed:
        path.unlink()


def log_points(points: Sequence[Point], result: Result) -> None:
    """Log one line with the times of one size."""
    size = f"{points[0].size:,}"
    times = "; ".join(
        f"{result.labels[p.contestant]} {p.left_out.text if p.left_out else seconds(p.seconds)}"
        for p in points
    )
    logger.info(f"{size}: {times}")
