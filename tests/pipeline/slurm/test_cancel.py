"""What `megabase cancel` does with a run: a table of plans, and the effects with programs that play SLURM."""

from dataclasses import replace
from pathlib import Path

import pytest

from megabase.pipeline import cli
from megabase.pipeline.errors import RunError, UserError
from megabase.pipeline.rundir.paths import RunPaths
from megabase.pipeline.rundir.status import write_status
from megabase.pipeline.slurm.cancel import Plan, cancel_run, plan
from megabase.pipeline.slurm.queue import Queue, write_jobs
from megabase.pipeline.slurm.seen import Jobs, Seen
from megabase.pipeline.slurm.status import jobs_of, judge
from tests.pipeline.slurm.test_queue import slurm
from tests.pipeline.slurm.test_status import AWAY, FORGOTTEN, NO_SLURM, queue, seen

CHAIN = Jobs((7, 8, 9), 7, "hg38")


def planned(run: Seen, answer: Queue, *, now: bool) -> Plan:
    return plan(judge(run, answer), jobs_of(run, answer), answer, now=now)


@pytest.mark.parametrize(
    ("run", "answer", "politely", "at_once"),
    [
        (seen(""), queue("PENDING"), Plan(waiting=(7,)), Plan(waiting=(7,))),
        (seen("again", 300), queue("REQUEUED"), Plan(waiting=(7,)), Plan(waiting=(7,))),
        (seen("running", 3), queue("RUNNING"), Plan(stop=True), Plan(running=(7,))),
        (seen(""), queue("RUNNING"), Plan(stop=True), Plan(running=(7,))),
        (seen("running", 3, 200), queue("RUNNING"), Plan(stop=True), Plan(running=(7,))),
        # Its training has ended; the job script decides whether it starts again.
        (seen("again", 3), queue("RUNNING"), Plan(stop=True), Plan(running=(7,))),
        (seen("running", 3), queue("COMPLETING"), Plan(stop=True), Plan(running=(7,))),
        (
            seen("running", 3, jobs=CHAIN),
            queue("RUNNING", "PENDING", "PENDING"),
            Plan(stop=True, waiting=(8, 9)),
            Plan(waiting=(8, 9), running=(7,)),
        ),
        (
            seen("again", 300, jobs=CHAIN),
            queue("COMPLETED", "PENDING", "PENDING"),
            Plan(waiting=(8, 9)),
            Plan(waiting=(8, 9)),
        ),
        # Without a job, or without an answer, only the run itself can be asked.
        (seen("running", 3, jobs=Jobs()), NO_SLURM, Plan(stop=True), "in no job that SLURM knows"),
        (seen("running", 3), AWAY, Plan(stop=True), "squeue does not answer: it is not known"),
        (seen("running", 3), FORGOTTEN, Plan(stop=True), "in no job that SLURM knows"),
        (seen("again", 300), AWAY, "touch runs/hg38/STOP", "squeue does not answer: it is not known"),
        (seen("again", 300), NO_SLURM, "squeue is not on PATH: it is not known", "is not on PATH"),
        (
            seen("finished", 300),
            FORGOTTEN,
            "nothing of runs/hg38 waits or runs: it is finished",
            "nothing of",
        ),
        (seen("running", 300), FORGOTTEN, "it is killed (no heartbeat for 5 min", "nothing of"),
        (seen("crashed", 300, jobs=Jobs()), NO_SLURM, "nothing of runs/hg38 waits or runs: it is", "nothing"),
    ],
)
def test_plans(run: Seen, answer: Queue, politely: Plan | str, at_once: Plan | str) -> None:
    for expected, now in ((politely, False), (at_once, True)):
        if isinstance(expected, Plan):
            assert planned(run, answer, now=now) == expected
        else:
            with pytest.raises(RunError) as error:
                planned(run, answer, now=now)
            assert expected in str(error.value)


def test_a_job_of_another_run_with_the_same_number_is_not_cancelled() -> None:
    answer = queue("RUNNING")
    other = replace(answer.jobs[7], command="/cluster/runs/phage/submit.sbatch", name="phage")
    with pytest.raises(RunError, match=r"nothing of"):
        planned(seen("again", 300), Queue({7: other}, answered=True), now=True)


@pytest.fixture
def run(tmp_path: Path) -> RunPaths:
    """A run that was submitted as jobs 7 and 8."""
    paths = RunPaths(tmp_path / "hg38")
    paths.directory.mkdir()
    paths.submit_script.touch()
    paths.submit_config.touch()
    write_jobs(paths.directory, [7, 8])
    return paths


def row(job: int, state: str) -> str:
    return f"{job}|{job}|{state}|None|n1|9|hg38|/x/hg38/submit.sbatch\\n"


def then(file: Path, after: str, before: str) -> str:
    """A line of bash that prints one thing before a file exists and another one after."""
    return f"if [[ -e {file} ]]; then printf '{after}'; else printf '{before}'; fi"


def test_a_chain_is_stopped_by_a_file_and_by_numbers(
    run: RunPaths, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    squeue = then(tmp_path / "cancelled", row(7, "RUNNING"), row(7, "RUNNING") + row(8, "PENDING"))
    # The STOP file is there before jobs are cancelled.
    scancel = f"[[ -e {run.stop} ]] && : > {tmp_path}/cancelled"
    slurm(monkeypatch, tmp_path, squeue=squeue, scancel=scancel)
    assert cli.main(["cancel", str(run.directory)]) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines() == [
        "cancelled job 8, in the queue",
        f"{run.stop} created: the run writes a checkpoint and ends; it does not start again",
        f"to continue it later: rm {run.stop} && megabase submit {run.submit_config}",
    ]
    assert printed.err == ""
    assert [line.split(maxsplit=2)[2] for line in (tmp_path / "called").read_text().splitlines()][1] == (
        "--state=PENDING 8"
    )
    # A second time: it has been asked.
    assert cli.main(["cancel", str(run.directory)]) == 0
    assert capsys.readouterr().out.startswith(f"{run.stop} exists already: the run writes a checkpoint")


def test_a_job_that_starts_while_it_is_cancelled_is_stopped(
    run: RunPaths, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    started = then(tmp_path / "late", row(7, "RUNNING"), row(7, "PENDING"))
    slurm(monkeypatch, tmp_path, squeue=started, scancel=f": > {tmp_path}/late")
    assert "created" in cancel_run(run.directory)[0]
    assert run.stop.exists()


def test_only_waiting_jobs_leave_no_stop_file(
    run: RunPaths, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    state = then(tmp_path / "late", row(7, "CANCELLED"), row(7, "PENDING"))
    slurm(monkeypatch, tmp_path, squeue=state, scancel=f": > {tmp_path}/late")
    assert cancel_run(run.directory) == [
        "cancelled job 7, in the queue",
        f"to continue it later: megabase submit {run.submit_config}",
    ]
    assert not run.stop.exists()


def test_a_job_that_slurm_does_not_cancel_is_named(
    run: RunPaths, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refuses = "echo scancel: error: Kill job error on job id 7: Access/permission denied >&2; exit 1"
    slurm(monkeypatch, tmp_path, squeue=f"printf '{row(7, 'PENDING')}'", scancel=refuses)
    assert cli.main(["cancel", str(run.directory)]) == 1
    error = capsys.readouterr().err
    assert "job 7 may not be cancelled: scancel: error: Kill job" in error and error.count("\n") == 1


@pytest.mark.parametrize("now", [False, True])
def test_a_run_without_slurm(
    run: RunPaths, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, now: bool
) -> None:
    slurm(monkeypatch, tmp_path)
    for file in (run.job, run.submit_config):
        file.unlink()
    with pytest.raises(RunError, match=r"nothing of .* waits or runs: it is not started"):
        cancel_run(run.directory, now=now)
    run.logs.mkdir()
    run.heartbeat(0).write_text('{"rank":0,"host":"h","pid":1,"step":1,"doing":"x","beat":1,"written":1}')
    write_status(run.directory, "running", 0)
    if now:
        with pytest.raises(RunError, match="in no job that SLURM knows here"):
            cancel_run(run.directory, now=True)
    else:
        assert cancel_run(run.directory)[1].endswith(f"rm {run.stop} && megabase train {run.config}")
    assert run.stop.exists() != now


def test_a_directory_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a run directory"):
        cancel_run(tmp_path)
