"""How a run stands: every combination of what SLURM says and what the run directory says."""

from dataclasses import replace
from pathlib import Path

import pytest

from megabase.pipeline.rundir.heartbeat import PATIENCE_S, Heartbeat
from megabase.pipeline.rundir.view import Size
from megabase.pipeline.slurm.queue import Job, Queue
from megabase.pipeline.slurm.seen import Jobs, Seen
from megabase.pipeline.slurm.status import Report, judge

NOW = 10_000.0
START = NOW - 1_000  # of the job
COMMAND = "/cluster/runs/hg38/submit.sbatch /cluster/runs/hg38/submit.yaml"
NO_SLURM = Queue()
FORGOTTEN = Queue(answered=True)
AWAY = Queue(problem="squeue does not answer")


def beats(*silent: float, idle: float = 2.0, step: int = 5) -> tuple[Heartbeat, ...]:
    """Heartbeats of ranks 0, 1, ... that were written so many seconds ago."""
    return tuple(
        Heartbeat(rank, f"n{rank + 1}", 1, step, "training", NOW - ago, NOW - ago - idle)
        for rank, ago in enumerate(silent)
    )


def seen(
    status: str = "running", *silent: float, began: float = START + 20, jobs: Jobs | None = None
) -> Seen:
    """A run whose status was written at `began`, and its heartbeats so many seconds ago."""
    return Seen(
        Path("runs/hg38"),
        jobs or Jobs((7,), 7, "hg38"),
        status,
        began if status else 0.0,
        Size(100, len(silent) or None),
        heartbeats=beats(*silent),
        now=NOW,
    )


def queue(*states: str, start: float = START) -> Queue:
    """What SLURM says of jobs 7, 8, ... of the run."""
    jobs = {
        number: Job(number, state, "", "n[1-2]", start, "hg38", COMMAND)
        for number, state in enumerate(states, 7)
    }
    return Queue(jobs, answered=True)


@pytest.mark.parametrize(
    ("run", "slurm", "state", "detail"),
    [
        # Before the run has written anything.
        (seen(""), queue("PENDING"), "waiting", ""),
        (seen(""), queue("RUNNING"), "starting", ""),
        (seen(""), NO_SLURM, "not started", ""),
        (seen(""), AWAY, "not started", ""),
        (seen(""), queue("FAILED"), "not started", "job 7 is FAILED"),
        # In a job that runs: what the start before left does not count.
        (seen("running", 3, 4), queue("RUNNING"), "running", ""),
        (seen("running", 3, 4), queue("CONFIGURING", start=NOW - 1), "starting", ""),
        (seen("again", 300, 300, began=START - 99), queue("RUNNING", start=NOW - 60), "starting", ""),
        (seen("running", 300, 300, began=START - 99), queue("RUNNING", start=NOW - 60), "starting", ""),
        (seen("finished", 3), queue("RUNNING"), "finished", ""),
        (seen("again", 300, 300), queue("PENDING"), "waiting", ""),
        (seen("running", 3, 4), queue("SUSPENDED"), "suspended", ""),
        # Clocks differ: by that of the file system, the status was written before the job started.
        (seen("running", 3, 4, began=START - 50), queue("RUNNING"), "running", ""),
        # A rank that hangs, and all of them.
        (
            seen("running", 3, 200),
            queue("RUNNING"),
            "hanging",
            "rank 1 on n2 has written no heartbeat for 3 min",
        ),
        (seen("running", 300, 301), queue("RUNNING"), "hanging", "no rank has written a heartbeat for 5 min"),
        (seen("running", 3, 200), NO_SLURM, "hanging", "rank 1 on n2"),
        # Not in SLURM, or SLURM does not answer: heartbeats decide.
        (seen("running", 3, 4, jobs=Jobs()), NO_SLURM, "running", ""),
        (seen("running", 3, 4), AWAY, "running", ""),
        (seen("running", 300, 301), AWAY, "silent", "no heartbeat for 5 min, last of rank 0 on n1"),
        (seen("running", 300, jobs=Jobs()), NO_SLURM, "silent", "it was killed, or its machine is frozen"),
        (seen("running", jobs=Jobs()), NO_SLURM, "silent", "no heartbeat"),
        # SLURM knows that it has ended.
        (seen("running", 3, 4), queue("NODE_FAIL"), "killed", "job 7 is NODE_FAIL; run it again to begin"),
        (seen("running", 3, 4), queue("COMPLETING"), "killed", "job 7 is COMPLETING"),
        (seen("running", 300, 4000), FORGOTTEN, "killed", "SLURM does not know job 7 any more"),
        (seen("stopped", 300), queue("COMPLETED"), "stopped", ""),
        (seen("again", 300), FORGOTTEN, "interrupted", ""),
        (seen("failed", 300), AWAY, "failed", ""),
        (seen("crashed", 300), NO_SLURM, "crashed", ""),
        (seen("finished", 3), FORGOTTEN, "finished", ""),
        # A local start after the jobs of a submission have ended, and a job that was submitted by hand.
        (seen("running", 3, 4, jobs=Jobs((7,))), queue("CANCELLED"), "running", ""),
        (seen("running", 3, 4, jobs=Jobs((), 7, "hg38")), queue("RUNNING"), "running", ""),
        (seen("running", 3, 4, jobs=Jobs((7,))), queue("PENDING"), "running", ""),
        (seen("running", 300, jobs=Jobs((7,))), queue("PENDING"), "waiting", ""),
        # A job of the same number in another cluster runs on there, whatever this one says.
        (seen("running", 3, 4), FORGOTTEN, "running", ""),
    ],
)
def test_states(run: Seen, slurm: Queue, state: str, detail: str) -> None:
    report = judge(run, slurm)
    assert report.state == state
    assert detail in report.detail and bool(detail) == bool(report.detail)
    assert (report.hang is not None) == (state == "hanging")


def test_a_job_of_another_run_with_the_same_number_is_not_shown() -> None:
    other = Job(7, "RUNNING", "", "n9", START, "phage", "/cluster/runs/phage/submit.sbatch")
    for jobs in (Jobs((7,), 7, "hg38"), Jobs((), 7, "hg38")):
        report = judge(seen("running", 3, jobs=jobs), Queue({7: other}, answered=True))
        assert (report.state, report.job) == ("running", None)


@pytest.mark.parametrize(
    ("states", "shown", "left"),
    [
        (("RUNNING", "PENDING", "PENDING"), 7, 2),
        (("COMPLETED", "RUNNING", "PENDING"), 8, 1),
        (("COMPLETED", "PENDING", "PENDING"), 8, 1),
        (("COMPLETED", "COMPLETED", "FAILED"), 9, 0),
    ],
)
def test_the_job_of_a_chain_that_matters(states: tuple[str, ...], shown: int, left: int) -> None:
    report = judge(seen("again", 300, jobs=Jobs((7, 8, 9), 7, "hg38")), queue(*states))
    assert report.job is not None
    assert (report.job.id, report.jobs_left) == (shown, left)


def test_of_jobs_that_have_ended_one_that_ran_is_shown() -> None:
    answer = queue("FAILED", "CANCELLED")
    never = Queue({**answer.jobs, 8: replace(answer.jobs[8], nodes="")}, answered=True)
    for jobs, shown in ((answer, 8), (never, 7)):
        job = judge(seen("stopped", 300, jobs=Jobs((7, 8), 7, "hg38")), jobs).job
        assert job and job.id == shown


def report_of(run: Seen) -> Report:
    return judge(run, queue("RUNNING"))


def test_ranks_that_wait_for_another_are_patient_for_ten_steps() -> None:
    run = replace(seen("running", 1, 1), heartbeats=beats(1, 1, idle=PATIENCE_S + 10))
    assert report_of(run).state == "hanging"
    for row in ({"step": 1, "time": 100.0}, {"step": 3, "time": 300.0}):
        run.figures.add(row | {"tokens_per_second": 1.0})
    assert run.figures.seconds_per_step == 100.0
    assert report_of(run).state == "running"


def test_a_stop_file_is_named_as_long_as_the_run_is_alive() -> None:
    assert (
        "STOP exists: it writes a checkpoint and ends"
        in report_of(replace(seen("running", 3), stop=True)).detail
    )
    assert not judge(replace(seen("stopped", 3), stop=True), FORGOTTEN).detail
    waiting = judge(replace(seen("again", 300), stop=True), queue("PENDING"))
    assert waiting.detail == "runs/hg38/STOP exists: its job ends when it starts"
