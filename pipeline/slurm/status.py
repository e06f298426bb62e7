"""How runs stand: what SLURM says and what their directories say, put together.

`judge` is pure. A state is what is true, not what a file says last: a run whose status file says "running" is running
only if its ranks have written heartbeats lately, or if SLURM runs its job.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from megabase.pipeline.readable import age
from megabase.pipeline.rundir.heartbeat import (
    PATIENCE_S,
    SILENT_S,
    Hang,
    Heartbeat,
    find_hang,
    written_since,
)
from megabase.pipeline.rundir.hint import resume_hint
from megabase.pipeline.rundir.paths import RunPaths
from megabase.pipeline.rundir.status import FINISHED, RUNNING, read_status
from megabase.pipeline.slurm.queue import ENDED, Job, Queue, ask
from megabase.pipeline.slurm.seen import Jobs, Seen, find_jobs, look

# What a state of status.json is called here.
NAMES = {
    "finished": "finished",
    "again": "interrupted",
    "stopped": "stopped",
    "failed": "failed",
    "crashed": "crashed",
}
# The states in which a run uses its nodes.
ALIVE = ("starting", "running", "hanging", "suspended")
# A step may take this many times as long as of late before a run counts as hanging.
_PATIENCE_STEPS = 10


@dataclass(frozen=True)
class Report:
    """How a run stands.

    Attributes:
        seen: what its directory says.
        state: not started, waiting (in SLURM's queue), starting, running, hanging, suspended (by SLURM), finished,
            interrupted (by a signal or a time limit, at a checkpoint), stopped (by a STOP file), failed (another start
            fails, too), crashed, killed (ended without writing how), or silent (no heartbeat, and nothing tells
            whether it has ended).
        detail: what a state alone does not tell, for people; "" if there is nothing.
        job: the job that runs, or else the one that runs next, or else the last that ran; None if SLURM knows none.
        jobs_left: further jobs of the run that wait.
        heartbeats: of the ranks of this start.
        hang: why it hangs, if it does.
    """

    seen: Seen
    state: str
    detail: str = ""
    job: Job | None = None
    jobs_left: int = 0
    heartbeats: tuple[Heartbeat, ...] = ()
    hang: Hang | None = None

    @property
    def name(self) -> str:
        """The run's name."""
        return self.seen.directory.resolve().name

    @property
    def alive(self) -> bool:
        """Whether the run uses its nodes."""
        return self.state in ALIVE

    @property
    def seconds_left(self) -> float | None:
        """Estimated seconds to the last step; None if it does not train, or that is not known."""
        return self.seen.figures.seconds_left(self.seen.now) if self.state == "running" else None

    @property
    def tokens_per_second(self) -> float | None:
        """Of all ranks, when it was last measured; None if it does not train."""
        return self.seen.figures.tokens_per_second if self.state == "running" else None


def report(directories: Iterable[Path]) -> tuple[list[Report], str]:
    """How runs stand, in the given order; SLURM is asked once for all of them.

    Returns:
        The reports, and why SLURM did not answer ("" if it did, or if there is no SLURM).
    """
    jobs = {directory: find_jobs(directory) for directory in directories}
    queue = ask_for(jobs)
    return [judge(look(directory, jobs[directory]), queue) for directory in jobs], queue.problem


def ask_for(jobs: dict[Path, Jobs]) -> Queue:
    """What SLURM knows of the jobs of runs. Of jobs of finished runs only the controller is asked."""
    numbers = {job for each in jobs.values() for job in each.all}
    unfinished = {
        job for directory, each in jobs.items() for job in each.all if read_status(directory)[0] != FINISHED
    }
    return ask(numbers, unfinished)


def judge(seen: Seen, queue: Queue) -> Report:
    """How a run stands.

    Args:
        seen: what its directory says.
        queue: what SLURM says, asked before.
    """
    job, left = _job(seen, queue)
    begin = job.start if job and job.runs else None
    heartbeats = tuple(written_since(seen.heartbeats, begin))
    state, detail, hang = _state(seen, job, queue, heartbeats)
    if seen.stop and state in (*ALIVE, "waiting"):
        what = "its job ends when it starts" if state == "waiting" else "it writes a checkpoint and ends"
        exists = f"{RunPaths(seen.directory).stop} exists: {what}"
        detail = f"{exists}; {detail}" if detail else exists
    return Report(seen, state, detail, job, left, heartbeats, hang)


def jobs_of(seen: Seen, queue: Queue) -> list[Job]:
    """What SLURM knows of the jobs of a run, in the order in which they run."""
    found = ((queue.jobs.get(number), number) for number in seen.jobs.all)
    return [job for job, number in found if job and _is_of(job, number, seen)]


def _job(seen: Seen, queue: Queue) -> tuple[Job | None, int]:
    """The job that describes a run, and how many others of it wait."""
    known = jobs_of(seen, queue)
    running = [job for job in known if job.runs]
    waiting = [job for job in known if job.waits]
    started = [job for job in known if job.nodes] or known
    chosen = next(iter(running + waiting + started[-1:]), None)
    return chosen, len([job for job in waiting if job is not chosen])


def _is_of(job: Job, number: int, seen: Seen) -> bool:
    if number in seen.jobs.submitted:
        return job.belongs_to(seen.directory)
    return not job.name or job.name == seen.jobs.last_name


def _state(
    seen: Seen, job: Job | None, queue: Queue, heartbeats: tuple[Heartbeat, ...]
) -> tuple[str, str, Hang | None]:
    """State, detail and hang of a run."""
    if job and job.waits:
        # Someone may have started it outside of its job.
        outside = seen.status == RUNNING and seen.jobs.last is None and _is_fresh(seen, heartbeats)
        return _alive(seen, heartbeats) if outside else ("waiting", "", None)
    if job and job.runs and job.state in ("SUSPENDED", "STOPPED"):
        return "suspended", "", None
    if job and job.runs and job.state != "COMPLETING":
        # Steps are trained after the status was written; the status may be that of the start before.
        begun = seen.status_time >= (job.start or 0.0) or any(each.step for each in heartbeats)
        if not begun or not seen.status or not heartbeats:
            return "starting", "", None
        return _alive(seen, heartbeats) if seen.status == RUNNING else (_called(seen), "", None)
    if not seen.status:
        return "not started", f"job {job.id} is {job.state}" if job else "", None
    if seen.status != RUNNING:
        return _called(seen), "", None
    return _alive_or_not(seen, job, queue, heartbeats)


def _alive_or_not(
    seen: Seen, job: Job | None, queue: Queue, heartbeats: tuple[Heartbeat, ...]
) -> tuple[str, str, Hang | None]:
    """The same for a run whose status says that it runs, and of which SLURM runs no job."""
    hint = resume_hint(seen.directory)
    last = seen.jobs.last
    ended = queue.jobs.get(last) if last is not None else None
    if ended and ended.state in {*ENDED, "COMPLETING"} and _is_of(ended, ended.id, seen):
        return "killed", f"job {ended.id} is {ended.state}; {hint}", None
    if _is_fresh(seen, heartbeats):
        return _alive(seen, heartbeats)
    newest = max(heartbeats, key=lambda each: each.written, default=None)
    silence = f"no heartbeat for {age(seen.now - newest.written)}" if newest else "no heartbeat"
    if last is not None and queue.answered and job is None:
        return "killed", f"{silence}, and SLURM does not know job {last} any more; {hint}", None
    if newest and newest.process_is_gone():
        return "killed", f"{silence}, and process {newest.pid} of rank {newest.rank} is gone; {hint}", None
    where = f", last of {newest.place}" if newest else ""
    return "silent", f"{silence}{where}: it was killed, or its machine is frozen; {hint}", None


def _called(seen: Seen) -> str:
    return NAMES.get(seen.status, seen.status)


def _is_fresh(seen: Seen, heartbeats: tuple[Heartbeat, ...]) -> bool:
    return any(seen.now - each.written <= SILENT_S for each in heartbeats)


def _alive(seen: Seen, heartbeats: tuple[Heartbeat, ...]) -> tuple[str, str, Hang | None]:
    patience = max(PATIENCE_S, _PATIENCE_STEPS * (seen.figures.seconds_per_step or 0.0))
    hang = find_hang(heartbeats, seen.now, patience)
    return ("hanging", hang.text, hang) if hang else ("running", "", None)
