"""What SLURM knows of a job."""

from __future__ import annotations

import subprocess
from pathlib import Path

from megabase.datamodules.files import publish_json
from megabase.pipeline.errors import UserError
from megabase.pipeline.files import read_object
from megabase.pipeline.rundir.paths import RunPaths

TIMEOUT_S = 20.0


def write_job(directory: Path, job: int) -> None:
    """Note in a run directory the job that was submitted. Raises OSError."""
    publish_json(RunPaths(directory).job, {"job": job})


def read_job(directory: Path) -> int | None:
    """The last job that was submitted for a run; None if there was none."""
    try:
        return int(read_object(RunPaths(directory).job)["job"])
    except (ValueError, KeyError, TypeError):
        return None


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
    job = read_job(directory)
    if job is not None and (state := state_in_queue(job)):
        raise UserError(
            f"run.name={name}: job {job} of this run is {state} already: follow it with `megabase watch {directory}`,"
            f" or end it with `scancel {job}` before you submit the run again"
        )
