"""What the directory of a run says of it, read once and cheaply: a table has many runs, a run many ranks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from megabase.pipeline.files import read_object
from megabase.pipeline.rundir.figures import Figures
from megabase.pipeline.rundir.heartbeat import Heartbeat, clock, read_heartbeats
from megabase.pipeline.rundir.journal import read_end
from megabase.pipeline.rundir.paths import RunPaths, newest_step
from megabase.pipeline.rundir.status import RUNNING, read_status
from megabase.pipeline.rundir.view import Size, read_size
from megabase.pipeline.slurm.queue import read_jobs

# Bytes read at the end of each journal: some hundred rows.
_END = 1 << 16


@dataclass(frozen=True)
class Jobs:
    """The jobs of a run, as its directory names them.

    Attributes:
        submitted: by the last `megabase submit`, in the order in which they run.
        last: the job of the last start, also if a user submitted it by hand; None if that start was in no job.
        last_name: name of that job.
    """

    submitted: tuple[int, ...] = ()
    last: int | None = None
    last_name: str = ""

    @property
    def all(self) -> tuple[int, ...]:
        """Each of them once."""
        more = () if self.last is None or self.last in self.submitted else (self.last,)
        return self.submitted + more


@dataclass(frozen=True)
class Seen:
    """What the directory of a run says.

    Attributes:
        directory: the run directory.
        jobs: of the run.
        status: state in status.json, see `training/outcome.py`; "" if there is none.
        status_time: when status.json was written.
        size: how large the run is.
        figures: of its journals.
        heartbeats: of its ranks, for a run that has not ended.
        checkpoint: step of the newest checkpoint; None if there is none.
        checkpoint_time: when it was published.
        restarts: how often the jobs were started again.
        stalls: starts in a row that brought no newer checkpoint.
        stop: whether a STOP file keeps it stopped.
        now: time at which all of this was read. All times are on the clock of the file system.
    """

    directory: Path
    jobs: Jobs = field(default_factory=Jobs)
    status: str = ""
    status_time: float = 0.0
    size: Size = field(default_factory=Size)
    figures: Figures = field(default_factory=Figures)
    heartbeats: tuple[Heartbeat, ...] = ()
    checkpoint: int | None = None
    checkpoint_time: float = 0.0
    restarts: int = 0
    stalls: int = 0
    stop: bool = False
    now: float = 0.0


def find_jobs(directory: Path) -> Jobs:
    """The jobs of a run."""
    environment = read_object(RunPaths(directory).environment).get("slurm")
    last, name = None, ""
    if isinstance(environment, dict):
        with suppress(KeyError, ValueError):
            last, name = int(environment["SLURM_JOB_ID"]), str(environment["SLURM_JOB_NAME"])
    return Jobs(tuple(read_jobs(directory)), last, name)


def look(directory: Path, jobs: Jobs) -> Seen:
    """Read a run directory. What cannot be read is as if it were not there.

    Ask SLURM before: a run whose job has ended by then has written how it ended.

    Args:
        directory: the run directory.
        jobs: of the run.
    """
    paths = RunPaths(directory)
    status, _ = read_status(directory)
    size = read_size(paths)
    heartbeats = tuple(read_heartbeats(directory, size.ranks))
    restarts, stalls = _starts(paths, jobs.all)
    checkpoint = None
    with suppress(OSError):
        checkpoint = newest_step(paths.checkpoints)
    newest = max((each.written for each in heartbeats), default=None)
    return Seen(
        directory=directory,
        jobs=jobs,
        status=status,
        status_time=_changed(paths.status),
        size=size,
        figures=_figures(paths, size),
        heartbeats=heartbeats,
        checkpoint=checkpoint,
        checkpoint_time=_changed(paths.checkpoints / f"step-{checkpoint}"),
        restarts=restarts,
        stalls=stalls,
        stop=paths.stop.exists(),
        now=clock(directory, newest if status == RUNNING else None),
    )


def _figures(paths: RunPaths, size: Size) -> Figures:
    figures = Figures(max_steps=size.max_steps)
    for path in (paths.metrics, paths.performance):
        with suppress(OSError):
            for row in read_end(path, _END):
                with suppress(KeyError, TypeError, ValueError):
                    figures.add(row)
    return figures


def _starts(paths: RunPaths, jobs: Sequence[int]) -> tuple[int, int]:
    """How often jobs were started again, by the log directories of their starts, and their stalls, by their records."""
    starts, stalls = 0, 0
    with suppress(OSError):
        pattern = re.compile(rf"slurm-({'|'.join(map(str, jobs))})\.[0-9]+")
        starts = sum(bool(pattern.fullmatch(path.name)) for path in paths.logs.glob("slurm-*.*"))
    for job in jobs:
        with suppress(KeyError, TypeError, ValueError):  # of the last job that has one
            stalls = int(read_object(paths.slurm_log(job).with_suffix(".json"))["stalls"])
    return max(starts - 1, 0), stalls


def _changed(path: Path) -> float:
    """Time of the last change of a file or directory; 0 if it is not there."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
