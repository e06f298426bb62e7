"""Stop a run for good: at a checkpoint, by its STOP file; jobs that wait, those of its chain among them, by scancel.

`plan` is pure and says what is to be done; `cancel_run` does it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megabase.pipeline.errors import RunError, UserError
from megabase.pipeline.rundir.paths import RunPaths
from megabase.pipeline.rundir.view import check_run_directory
from megabase.pipeline.slurm.queue import Job, Queue, ask, cancel
from megabase.pipeline.slurm.seen import find_jobs, look
from megabase.pipeline.slurm.status import Report, jobs_of, judge
from megabase.pipeline.tracking.last_word import say_last_word
from megabase.pipeline.tracking.status import KILLED


@dataclass(frozen=True)
class Plan:
    """What stops a run.

    Attributes:
        stop: create its STOP file.
        waiting: jobs to cancel if they wait.
        running: jobs to cancel although they run.
    """

    stop: bool = False
    waiting: tuple[int, ...] = ()
    running: tuple[int, ...] = ()


def plan(report: Report, jobs: Sequence[Job], queue: Queue, *, now: bool) -> Plan:
    """What stops a run.

    Args:
        report: how it stands.
        jobs: those of it that SLURM knows.
        queue: SLURM's answer.
        now: end it without a checkpoint.

    Raises:
        RunError: nothing of it runs or waits, or it is not known whether.
    """
    waiting = tuple(job.id for job in jobs if job.waits)
    running = tuple(job.id for job in jobs if job.runs)
    submitted = bool(report.seen.jobs.all)
    directory, stop = report.seen.directory, RunPaths(report.seen.directory).stop
    if now and (waiting or running):
        return Plan(waiting=waiting, running=running)
    if now and report.alive and not (submitted and not queue.answered):
        raise RunError(
            f"{directory} runs, but in no job that SLURM knows here: --now cancels jobs; without it, the run stops at a"
            " checkpoint"
        )
    if report.alive and not now:
        return Plan(stop=True, waiting=waiting)
    if waiting or running:  # a job whose training has ended: it must not go back into the queue
        return Plan(stop=bool(running), waiting=waiting)
    if submitted and not queue.answered:
        why = queue.problem or "squeue is not on PATH"
        raise RunError(
            f"{why}: it is not known whether a job of {directory} waits or runs; try again where SLURM answers, or"
            f" `touch {stop}`: a run that finds it stops at a checkpoint, and a job that starts ends"
        )
    why = f"it is {report.state}" + (f" ({report.detail})" if report.detail else "")
    raise RunError(f"nothing of {directory} waits or runs: {why}")


def cancel_run(directory: Path, *, now: bool = False) -> list[str]:
    """Stop a run; returns what was done, in lines for people.

    Args:
        directory: the run directory.
        now: end it without a checkpoint.

    Raises:
        UserError: this is not a run directory, or it cannot be written.
        RunError: nothing of it runs or waits, or it is not known whether, or SLURM does not cancel its jobs.
    """
    check_run_directory(directory)
    report, jobs, queue = _look(directory)
    todo = plan(report, jobs, queue, now=now)
    existed = report.seen.stop
    # First, so that a job which starts meanwhile finds it.
    if todo.stop:
        _write_stop(directory)
    complaint = _cancel(todo)
    if complaint or todo.waiting:
        _, after, answer = _look(directory)
        left = [job.id for job in after if job.waits and job.id in todo.waiting]
        if left or not answer.answered:
            why = complaint or answer.problem or "it is still in the queue"
            raise RunError(f"{_named(left or todo.waiting)} may not be cancelled: {why}; try again")
        if not todo.stop and not now and any(job.runs and job.id in todo.waiting for job in after):
            todo = Plan(stop=True)  # it has started meanwhile
            _write_stop(directory)
    if not todo.stop and not todo.running:
        say_last_word(directory, KILLED)  # nobody else does: no job of the run starts again
    return _message(report, todo, existed=existed, queue=queue)


def _look(directory: Path) -> tuple[Report, list[Job], Queue]:
    jobs = find_jobs(directory)
    queue = ask(jobs.all)
    seen = look(directory, jobs)
    return judge(seen, queue), jobs_of(seen, queue), queue


def _cancel(todo: Plan) -> str:
    """Cancel jobs; returns what scancel complains of."""
    waiting = cancel(todo.waiting, waiting=True) if todo.waiting and not todo.running else ""
    running = cancel((*todo.waiting, *todo.running), waiting=False) if todo.running else ""
    return waiting or running


def _write_stop(directory: Path) -> None:
    stop = RunPaths(directory).stop
    try:
        stop.touch()
    except OSError as error:
        raise UserError(f"{stop} cannot be written ({error.strerror}): the run is not stopped") from None


def _message(report: Report, todo: Plan, *, existed: bool, queue: Queue) -> list[str]:
    """What was done, what comes next, and how to continue the run."""
    paths = RunPaths(report.seen.directory)
    lines = []
    if todo.waiting:
        lines.append(f"cancelled {_named(todo.waiting)}, in the queue")
    if todo.running:
        lines.append(
            f"cancelled {_named(todo.running)}: SLURM ends it now; there may be no time for a checkpoint"
        )
    if todo.stop:
        what = "exists already" if existed else "created"
        lines.append(f"{paths.stop} {what}: the run writes a checkpoint and ends; it does not start again")
        if report.hang:
            lines.append(f"but {report.hang.text}; `megabase cancel {paths.directory} --now` ends the job")
        if report.seen.jobs.all and not queue.answered:
            why = queue.problem or "squeue is not on PATH"
            lines.append(f"{why}: jobs in the queue were not cancelled, but each ends when it starts")
    command = (
        f"megabase submit {paths.submit_config}"
        if paths.submit_config.exists()
        else f"megabase train {paths.config}"
    )
    first = f"rm {paths.stop} && " if todo.stop or existed else ""
    return [*lines, f"to continue it later: {first}{command}"]


def _named(jobs: Sequence[int]) -> str:
    return f"job{'s' if len(jobs) > 1 else ''} {', '.join(map(str, jobs))}"
