"""The jobs of a run, and what SLURM knows of them: `squeue`, and `sacct` for jobs that ended long ago.

What the programs print is parsed by pure functions; `ask` calls each of them at most once, for any number of jobs.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from megabase.datamodules.files import publish_json
from megabase.pipeline.errors import UserError
from megabase.pipeline.files import read_object
from megabase.pipeline.rundir.paths import RunPaths

TIMEOUT_S = 20.0
# States of a job that waits to run, and of one that has ended. In all others it has nodes.
WAITING = {"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD"}
ENDED = {
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "REVOKED",
    "TIMEOUT",
}
# Id (of an array: of the array), own id, state, reason, nodes, start, name, command. The last may have any characters.
_SQUEUE = "--format=%F|%A|%T|%r|%N|%S|%j|%o"
_SACCT = "--format=JobIDRaw,State,NodeList,Start"
# squeue answers so if it is asked for a single job that the controller has forgotten.
_FORGOTTEN = "Invalid job id"


@dataclass(frozen=True)
class Job:
    """A job, as SLURM describes it.

    Attributes:
        id: its number.
        state: such as PENDING.
        reason: why it waits, or why it ended; "" if there is none.
        nodes: that it has or had, such as n[1-4]; "" if none.
        start: Unix time at which it started, or is expected to start; None: not known.
        name: its name; "" if not known.
        command: script and arguments; "" if not known.
    """

    id: int
    state: str
    reason: str = ""
    nodes: str = ""
    start: float | None = None
    name: str = ""
    command: str = ""

    @property
    def waits(self) -> bool:
        """Whether it is in the queue."""
        return self.state in WAITING

    @property
    def runs(self) -> bool:
        """Whether it has nodes."""
        return self.state not in WAITING and self.state not in ENDED

    def belongs_to(self, directory: Path) -> bool:
        """Whether `megabase submit` made this job for a run.

        The number alone does not tell: another cluster, or this one after a reset, gives the same to other jobs. Only
        names are compared, because machines may see the same directory at different paths.
        """
        script = Path((self.command.split() or [""])[0])
        return not self.command or script.parent.name == directory.resolve().name


@dataclass(frozen=True)
class Queue:
    """What SLURM answered.

    Attributes:
        jobs: those that it knows, by number.
        answered: whether the controller answered. Then a job that is not in `jobs` neither waits nor runs.
        problem: why it did not, in one line; "" if it did, or if this machine has no SLURM.
    """

    jobs: Mapping[int, Job] = field(default_factory=dict)
    answered: bool = False
    problem: str = ""


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


def ask(jobs: Collection[int], ended: Collection[int] = ()) -> Queue:
    """What SLURM knows of jobs.

    Args:
        jobs: their numbers.
        ended: those of `jobs` of which the accounting is asked, if the controller has forgotten them.
    """
    if not jobs:
        return Queue()
    try:
        code, printed, error = _call("squeue", "--noheader", "--states=all", _ids(jobs), _SQUEUE)
    except FileNotFoundError:
        return Queue()
    except subprocess.TimeoutExpired:
        return Queue(problem=f"squeue does not answer within {TIMEOUT_S:.0f} s")
    except OSError as caught:
        return Queue(problem=f"squeue cannot be run: {caught.strerror}")
    if code and _FORGOTTEN not in error:
        # The last line says what the ones before it led to.
        lines = error.strip().splitlines() or [f"squeue: exit code {code}"]
        return Queue(problem=lines[-1] if lines[-1].startswith("squeue: ") else f"squeue: {lines[-1]}")
    found = parse_squeue(printed)
    if forgotten := set(ended) - set(found):
        with suppress(
            OSError, subprocess.TimeoutExpired
        ):  # most clusters without accounting have no sacct, either
            _, printed, _ = _call(
                "sacct", "--noheader", "--parsable2", "--allocations", _ids(forgotten), _SACCT
            )
            found = parse_sacct(printed) | found
    return Queue(found, answered=True)


def parse_squeue(printed: str) -> dict[int, Job]:
    """The jobs in what `squeue` printed. The number of an array stands for an element that runs, or else waits."""
    found: dict[int, Job] = {}
    for line in printed.splitlines():
        fields = line.strip().split("|", 7)
        if len(fields) != 8 or not (fields[0].isdigit() and fields[1].isdigit()):
            continue  # a site's greeting
        base, own, state, reason, nodes, start, name, command = fields
        reason = "" if reason in ("None", "(null)") else reason
        job = Job(int(own), state, reason, nodes, _time(start), name, command)
        for number in {int(base), job.id}:
            if number not in found or _rank(job) < _rank(found[number]):
                found[number] = job
    return found


def parse_sacct(printed: str) -> dict[int, Job]:
    """The jobs in what `sacct` printed. A state has no more than its first word: "CANCELLED by 1000" is CANCELLED."""
    found: dict[int, Job] = {}
    for line in printed.splitlines():
        fields = line.strip().split("|")
        if len(fields) == 4 and fields[0].isdigit() and fields[1]:
            id, state, nodes, start = fields
            nodes = "" if nodes == "None assigned" else nodes
            found[int(id)] = Job(int(id), state.split()[0], "", nodes, _time(start))
    return found


def refuse_second(directory: Path, name: str) -> None:
    """Raise UserError if a job of this run waits or runs."""
    queue = ask(read_jobs(directory))
    for job in queue.jobs.values():
        if (job.waits or job.runs) and job.belongs_to(directory):
            raise UserError(
                f"run.name={name}: job {job.id} of this run is {job.state} already: follow it with `megabase status"
                f" {directory}`, or end it with `megabase cancel {directory}` before you submit the run again"
            )


def cancel(jobs: Iterable[int], *, waiting: bool) -> str:
    """Cancel jobs; those that have ended by now are left as they are.

    Args:
        jobs: their numbers.
        waiting: only those that wait: one that has started meanwhile goes on.

    Returns:
        What scancel complains of, in one line. That a job has ended already is such a complaint, so ask again.
    """
    only = ["--state=PENDING"] if waiting else []
    try:
        _, _, error = _call("scancel", *only, *map(str, jobs))
    except (OSError, subprocess.TimeoutExpired) as caught:
        return f"scancel fails: {caught}"
    return " ".join(error.split())


def _call(*words: str) -> tuple[int, str, str]:
    """Run a program of SLURM: exit code, stdout, stderr. Times are printed as Unix times."""
    environment = os.environ | {"SLURM_TIME_FORMAT": "%s"}
    done = subprocess.run(
        words, env=environment, capture_output=True, text=True, errors="replace", timeout=TIMEOUT_S
    )
    return done.returncode, done.stdout, done.stderr


def _ids(jobs: Iterable[int]) -> str:
    return f"--jobs={','.join(map(str, sorted(jobs)))}"


def _time(text: str) -> float | None:
    return float(text) if text.isdigit() else None


def _rank(job: Job) -> int:
    return 0 if job.runs else 1 if job.waits else 2
