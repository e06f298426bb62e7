"""What a cluster does to jobs: each goes on from its last checkpoint, or ends where it should, within a bounded time.

Training is `training_stub.py`. The jobs run at the same time on the four nodes; most of a test is waiting for SLURM.
"""

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megabase.pipeline import cli
from megabase.pipeline.slurm.queue import read_jobs
from megabase.pipeline.slurm.script import TRAIN_SCRIPT
from megabase.pipeline.training import submission
from megabase.slurm.testcluster.cluster import TestCluster, until
from tests.slurm import training_stub

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
# Seconds within which a job must have come to its end, on a busy machine.
BOUND_S = 120


def write_program(directory: Path) -> Path:
    """The program `megabase` in a directory, for PATH: the stub."""
    directory.mkdir(parents=True, exist_ok=True)
    program = directory / "megabase"
    program.write_text(f'#!/bin/bash\nPYTHONPATH= exec {sys.executable} {training_stub.__file__} "$@"\n')
    program.chmod(0o755)
    return program


class Training:
    """A training in `home`, submitted by sbatch with two ranks on each node."""

    def __init__(
        self, cluster: TestCluster, home: Path, *options: str, settings: tuple[str, ...] = ()
    ) -> None:
        self.cluster, self.home = cluster, home
        program = write_program(home)
        self.job = cluster.submit(
            *(
                "--ntasks-per-node=2",
                f"--output={home}/%j.out",
                *options,
                str(TRAIN_SCRIPT),
                str(home),
                *settings,
            ),
            cwd=home,
            env={
                "PATH": f"{home}:{os.environ['PATH']}",
                "MEGABASE": str(program),
                "MEGABASE_MAX_STALLS": "2",
            },
        )

    def heartbeat(self, rank: int) -> dict[str, int]:
        try:
            found: dict[str, int] = json.loads(
                (self.home / "run" / "logs" / f"rank-{rank}.heartbeat").read_text()
            )
        except FileNotFoundError:
            found = {"step": 0}
        return found

    def reaches(self, step: int) -> None:
        """Wait for a step."""
        assert until(lambda: self.heartbeat(1)["step"] >= step, BOUND_S), self.log()

    def kill(self, rank: int, signum: signal.Signals) -> None:
        os.kill(self.heartbeat(rank)["pid"], signum)

    def log(self, job: int | None = None) -> str:
        return (self.home / f"{job or self.job}.out").read_text()

    def starts(self, job: int | None = None) -> list[tuple[int, str]]:
        """The step from which each start of a job went on, and its first node."""
        lines = [line.split() for line in self.log(job).splitlines() if line.startswith("from step ")]
        return [(int(words[2]), words[4]) for words in lines]

    def finishes(self, restarts: int) -> dict[str, str]:
        """Wait for the end of the whole run; returns what SLURM knows of the job."""
        self.cluster.wait(self.job, {"COMPLETED"}, BOUND_S)
        shown = self.cluster.show(self.job)
        assert int(shown["Restarts"]) == restarts, self.log()
        steps = [step for step, _ in self.starts()]
        assert steps[0] == 0 and steps == sorted(set(steps)), self.log()  # each start brought it forward
        assert (self.home / "run" / "checkpoints" / "step-40").exists()
        return shown


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("failures")


@pytest.fixture(scope="module")
def trainings(cluster: TestCluster, folder: Path) -> Iterator[dict[str, Training]]:
    """All that run at the same time: `bad_node` on n1 and n2, `lost` on two of n2, n3 and n4, the others on n4."""

    def start(name: str, *options: str, settings: tuple[str, ...] = ()) -> None:
        (folder / name).mkdir()
        found[name] = Training(cluster, folder / name, *options, settings=settings)

    found: dict[str, Training] = {}
    start("bad_node", "--exclude=n3,n4", settings=("bad_node=n1",))
    start("lost", "--nodes=2", "--exclude=n1")
    for name in ("killed", "frozen", "requeued", "cancelled"):
        start(name, "--nodelist=n4", settings=("steps=40" if name != "cancelled" else "steps=4000",))
    for each in ("killed", "frozen", "requeued", "cancelled", "lost"):
        found[each].reaches(12)
    found["killed"].kill(1, signal.SIGKILL)
    found["frozen"].kill(1, signal.SIGSTOP)
    cluster.run("scontrol", "requeue", str(found["requeued"].job))
    cluster.run("scancel", str(found["cancelled"].job))
    start("full", "--nodelist=n4", settings=("crash=1",))
    cluster.kill_node("n3")
    cluster.restart_controller()
    yield found
    cluster.clear()
    cluster.start_node("n3")
    assert until(lambda: "n3:idle" in cluster.run("sinfo", "-hN", "--format=%N:%t"), 60)


def test_a_node_on_which_a_job_dies_twice_is_excluded(trainings: dict[str, Training]) -> None:
    training = trainings["bad_node"]
    shown = training.finishes(restarts=2)
    assert training.starts() == [(0, "n1"), (5, "n1"), (10, "n2")]
    assert shown["ExcNodeList"] == "n1,n[3-4]"  # those of the user as well
    assert "n1 failed 2 times or more: excluded from now on" in training.log()


def test_a_rank_that_is_killed(trainings: dict[str, Training]) -> None:
    trainings["killed"].finishes(restarts=1)
    assert "srun: error: n4: task 1: Killed" in trainings["killed"].log()


def test_a_rank_that_is_frozen(trainings: dict[str, Training]) -> None:
    """The other rank ends; srun then ends the one that cannot answer SIGTERM."""
    trainings["frozen"].finishes(restarts=1)
    assert "megabase: has not moved" in trainings["frozen"].log()


def test_a_full_disk(trainings: dict[str, Training]) -> None:
    trainings["full"].finishes(restarts=1)
    assert "(crashed); back in the queue (restart 1)" in trainings["full"].log()


def test_an_administrator_requeues_the_job(trainings: dict[str, Training]) -> None:
    """SLURM sends SIGTERM, and the ranks write a checkpoint."""
    trainings["requeued"].finishes(restarts=1)
    assert trainings["requeued"].starts()[1][0] > 10


def test_scancel_ends_the_job_for_good(trainings: dict[str, Training]) -> None:
    training = trainings["cancelled"]
    training.cluster.wait(training.job, {"CANCELLED"}, BOUND_S)
    assert training.starts() == [(0, "n4")]
    assert not list(training.home.glob("*.json"))  # the record between starts


@pytest.fixture
def chains(
    cluster: TestCluster, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> dict[str, list[int]]:
    """Chains of three jobs on n1, submitted with `megabase submit`: the ids by run."""
    monkeypatch.setattr(submission, "check_submission", lambda config, call, ranks: [])
    program = write_program(folder / "bin")
    monkeypatch.setattr(sys, "executable", str(program.with_name("python")))
    monkeypatch.setattr(os, "environ", cluster.environment)
    monkeypatch.chdir(folder)
    found = {}
    for name, steps in (("preempted", 4000), ("signalled", 40)):
        # The stub takes `HOME KEY=VALUE` where the job gives its settings' file.
        extra = f'slurm.extra=["--nodelist=n1","--export=ALL,STUB_HOME={folder}/{name},STUB_STEPS={steps}"]'
        settings = [
            f"run.name={name}",
            "run.root=runs",
            "data.shards=s",
            "data.length=64",
            "trainer.devices=2",
        ]
        more = ["slurm.gpus=null", "slurm.partition=spot", "slurm.max_stalls=2", extra, "--chain", "3"]
        assert cli.main(["submit", *settings, *more]) == 0
        found[name] = read_jobs(folder / "runs" / name)
        ids = ", ".join(map(str, found[name]))
        assert f"jobs {ids} submitted, each continues the one before" in capsys.readouterr().out
    return found


def test_chains(cluster: TestCluster, folder: Path, chains: dict[str, list[int]]) -> None:
    """One is signalled and finishes; one is preempted by SLURM, which cancels it, and then cancelled by scancel."""

    def log(name: str, number: int) -> str:
        file = folder / "runs" / name / "logs" / f"slurm-{chains[name][number]}.out"
        return file.read_text() if file.exists() else ""

    signalled, preempted = chains["signalled"], chains["preempted"]
    assert until(lambda: all("from step 0" in log(name, 0) for name in chains), 60)
    cluster.run("scancel", "--signal=USR1", str(signalled[0]))
    cluster.wait(signalled[1], {"COMPLETED"}, BOUND_S)
    assert f"checkpointed; job {signalled[1]} continues (restart 1)" in log("signalled", 0)
    cluster.wait(signalled[2], {"CANCELLED"}, 60)
    assert f"the run needs no further job: cancels {signalled[2]}" in log("signalled", 1)

    urgent = cluster.submit("--partition=urgent", "--nodelist=n1", "--exclusive", "--wrap=true", cwd=folder)
    cluster.wait(urgent, {"COMPLETED"}, 60)
    assert until(lambda: "from step" in log("preempted", 1), 60)
    assert "from step 0" not in log("preempted", 1)
    cluster.run("scancel", str(preempted[1]))
    for job in preempted[1:]:
        cluster.wait(job, {"CANCELLED"}, 60)
    assert f"cancels {preempted[2]}" in log("preempted", 1) and not log("preempted", 2)


def test_a_node_that_loses_power(trainings: dict[str, Training]) -> None:
    """Last, because SLURM waits NODE_TIMEOUT_S before it gives the node up."""
    training = trainings["lost"]
    shown = training.finishes(restarts=1)
    assert [node for _, node in training.starts()] == ["n2", "n2"]
    assert shown["NodeList"] == "n[2,4]"
    assert "srun: error: Node failure on n3" in training.log()
