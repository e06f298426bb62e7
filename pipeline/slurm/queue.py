"""The jobs of a run, and what SLURM knows of them."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

from megabase.datamodules.files import publish_json
from megabase.pipeline.errors import UserError
from megabase.pipeline.files import read_object
from megabase.pipeline.rundir.paths import RunPaths

TIMEOUT_S = 20.0


def write_jobs(directory: Path, jobs: Sequence[int]) -> None:
    """Note in a run directory the jobs of a submission, in the order in which they run. Raises OSError."""
    publish_json(RunPaths(directory).job, {"jobs": list(jobs)})


def read_jobs(directory: Path) -> list[int]:
    """The jobs of a run's last submission, in the order in which they run; empty if there was none."""
    found = read_object(RunPaths(directory).job)
    jobs = found.get("jobs", [found["job"]] if "job" in found else [])  # before chains: {"job": ID}
    try:
        return [int(job) for job in jobs]
    except (ValueError, TypeError):
        return []


def state_in_queue(job: int) -> str | None:
    """The state of a job that waits or runs, such as PENDING; None if it does not, or SLURM does not answer."""
    command = ["squeue", "--noheader", f"--jobs={job}", "--format=%T"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.split()[0] if done.returncode == 0 and done.stdout.split() else None


def refuse_second(directory: Path, name: str) -> None:
    """Raise UserError if a job of this run waits or runs."""
    for job in read_jobs(directory):
        if state := state_in_queue(job):
            raise UserError(
                f"run.name={name}: job {job} of this run is {state} already: follow it with `megabase watch"
                f" {directory}`, or end it with `scancel {job}` before you submit the run again"
            )
