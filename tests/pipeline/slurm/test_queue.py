"""The jobs of a run in its directory, and what SLURM's programs print about them."""

import re
from pathlib import Path

import pytest

from megabase.pipeline.rundir.paths import RunPaths
from megabase.pipeline.slurm import queue as queue_module
from megabase.pipeline.slurm.queue import Job, Queue, ask, parse_sacct, parse_squeue, read_jobs, write_jobs


def test_jobs_are_kept_in_their_order(tmp_path: Path) -> None:
    write_jobs(tmp_path, [12, 9, 30])
    assert read_jobs(tmp_path) == [12, 9, 30]


@pytest.mark.parametrize(
    ("content", "jobs"),
    [
        ('{"job": 7}', [7]),  # as versions before chains wrote it
        ('{"jobs": [7, "x"]}', []),
        ('{"jobs": 7}', []),
        ('{"job": null}', []),
        ("{torn", []),
        ("{}", []),
    ],
)
def test_other_contents(tmp_path: Path, content: str, jobs: list[int]) -> None:
    RunPaths(tmp_path).job.write_text(content)
    assert read_jobs(tmp_path) == jobs


def test_a_run_that_was_not_submitted_has_no_jobs(tmp_path: Path) -> None:
    assert read_jobs(tmp_path) == []


# Printed by squeue 22.05 for an array of which one element runs, jobs that wait for different reasons, and ended ones.
SQUEUE = """\
38135|38135|CANCELLED|None|n[1-2]|1795872376|phage|/tmp/sa/work/runs/phage/submit.sbatch /tmp/sa/work/runs/phage 600
38139|38139|FAILED|NonZeroExitCode|n1|1795872406|wrap|(null)
38136|38136|PENDING|JobArrayTaskLimit||N/A|a b|/tmp/sa/j.sh 100
38137|38137|PENDING|BeginTime||1795876005|r2|/tmp/sa/j.sh x|y z
38138|38138|PENDING|JobHeldUser||N/A|j.sh|/tmp/sa/j.sh 1
38136|38140|RUNNING|None|n[1-2]|1795872406|a b|/tmp/sa/j.sh 100
"""


def test_what_squeue_prints() -> None:
    jobs = parse_squeue(f"Welcome to the cluster | of many\n\n{SQUEUE}")
    assert set(jobs) == {38135, 38136, 38137, 38138, 38139, 38140}
    phage, waiting = jobs[38135], jobs[38137]
    assert (phage.state, phage.reason, phage.nodes, phage.start) == ("CANCELLED", "", "n[1-2]", 1795872376.0)
    assert not phage.waits and not phage.runs
    assert phage.belongs_to(Path("elsewhere/runs/phage")) and not phage.belongs_to(Path("runs/hg38"))
    assert waiting.waits and (waiting.reason, waiting.command) == ("BeginTime", "/tmp/sa/j.sh x|y z")
    assert jobs[38138].start is None


@pytest.mark.parametrize("lines", [SQUEUE.splitlines(), SQUEUE.splitlines()[::-1]])
def test_an_array_is_known_by_its_running_element(lines: list[str]) -> None:
    jobs = parse_squeue("\n".join(lines))
    assert jobs[38136].id == jobs[38140].id == 38140
    assert jobs[38136].runs


def test_what_sacct_prints() -> None:
    printed = (
        "12|CANCELLED by 1000|n[1-4]|1795872376\n13|PENDING|None assigned|Unknown\nSlurm accounting is slow\n"
    )
    jobs = parse_sacct(printed)
    assert jobs == {12: Job(12, "CANCELLED", "", "n[1-4]", 1795872376.0), 13: Job(13, "PENDING")}


def slurm(monkeypatch: pytest.MonkeyPatch, directory: Path, **programs: str) -> None:
    """Put programs of SLURM, as lines of bash, on a PATH with nothing else. Each notes its arguments in `called`."""
    (directory / "bin").mkdir()
    for name, body in programs.items():
        file = directory / "bin" / name
        file.write_text(f"#!/bin/bash\necho {name} $SLURM_TIME_FORMAT $* >> {directory}/called\n{body}\n")
        file.chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory / 'bin'}")


def test_slurm_is_asked_once_for_all_jobs_and_the_accounting_for_those_that_it_has_forgotten(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    slurm(
        monkeypatch,
        tmp_path,
        squeue="echo '7|7|RUNNING|None|n1|100|x|/runs/x/submit.sbatch'",
        sacct="echo '5|TIMEOUT|n2|90'",
    )
    queue = ask({7, 6, 5}, ended={7, 5})
    assert queue == Queue(
        {
            7: Job(7, "RUNNING", "", "n1", 100.0, "x", "/runs/x/submit.sbatch"),
            5: Job(5, "TIMEOUT", "", "n2", 90.0),
        },
        answered=True,
    )
    called = (tmp_path / "called").read_text().splitlines()
    assert [line.split()[0] for line in called] == ["squeue", "sacct"]
    assert "%s" in called[0] and "--jobs=5,6,7" in called[0] and "--jobs=5 " in called[1]


@pytest.mark.parametrize(
    ("squeue", "answered", "problem"),
    [
        ("echo slurm_load_jobs error: Invalid job id specified >&2; exit 1", True, ""),
        ("echo Unable to contact slurm controller >&2; exit 1", False, "squeue: Unable to contact slurm"),
        ("exit 3", False, "squeue: exit code 3"),
        ("while :; do :; done", False, "squeue does not answer within"),
    ],
)
def test_a_controller_without_an_answer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, squeue: str, answered: bool, problem: str
) -> None:
    monkeypatch.setattr(queue_module, "TIMEOUT_S", 0.2 if "while" in squeue else 20.0)
    slurm(monkeypatch, tmp_path, squeue=squeue, sacct="echo Slurm accounting storage is disabled >&2; exit 1")
    queue = ask({7}, {7})
    assert (queue.jobs, queue.answered) == ({}, answered)
    assert re.match(problem, queue.problem) and bool(queue.problem) == bool(problem)


def test_without_slurm_or_without_jobs_there_is_no_problem(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    slurm(monkeypatch, tmp_path)
    assert ask({7}, {7}) == ask(set()) == Queue()
