"""`megabase status` and `megabase cancel` on a real SLURM. Its jobs run train.sbatch with a stub (run_stub.py)."""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from megabase.pipeline import cli
from megabase.pipeline.rundir import heartbeat
from megabase.pipeline.rundir.paths import RunPaths
from megabase.pipeline.slurm.queue import write_jobs
from megabase.pipeline.slurm.script import TRAIN_SCRIPT
from megabase.slurm.testcluster.cluster import TestCluster, until

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
ROOT = Path(__file__).parents[2]


class Run:
    """A run of two nodes, submitted to a cluster, as its user sees it."""

    def __init__(
        self,
        cluster: TestCluster,
        directory: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        self.cluster, self.paths, self._capsys = cluster, RunPaths(directory), capsys
        self.jobs: list[int] = []
        self.paths.logs.mkdir(parents=True)
        self.paths.submit_script.write_text(TRAIN_SCRIPT.read_text())
        self._program = directory / "megabase"
        stub = Path(__file__).with_name("run_stub.py")
        self._program.write_text(
            f'#!/bin/bash\nexport PYTHONPATH={ROOT}\nexec {sys.executable} -P {stub} "$@"\n'
        )
        self._program.chmod(0o755)
        monkeypatch.setenv("SLURM_CONF", str(cluster.config))

    def submit(self, *options: str, steps: int = 100_000) -> None:
        """Submit one more job of the run."""
        directory = self.paths.directory
        job = self.cluster.submit(
            *("--nodes=2", "--ntasks-per-node=1", f"--job-name={directory.name}", *options),
            f"--output={self.paths.slurm_log('%j')}",
            *(str(self.paths.submit_script), str(directory), str(steps)),
            cwd=directory,
            env={"MEGABASE": str(self._program)},
        )
        self.jobs.append(job)
        write_jobs(directory, self.jobs)

    def status(self) -> dict[str, Any]:
        self._capsys.readouterr()
        assert cli.main(["status", str(self.paths.directory), "--json"]) == 0
        printed = self._capsys.readouterr()
        assert printed.err == ""
        (found,) = json.loads(printed.out)
        assert isinstance(found, dict)
        return found

    def becomes(self, state: str, timeout_s: float = 30) -> dict[str, Any]:
        """Wait until the run is in a state; returns its status."""
        assert until(lambda: self.status()["state"] == state, timeout_s), (self.status(), self.log())
        return self.status()

    def cancel(self, *options: str) -> str:
        self._capsys.readouterr()
        assert cli.main(["cancel", str(self.paths.directory), *options]) == 0
        return self._capsys.readouterr().out

    def log(self) -> str:
        return "".join(path.read_text() for path in self.paths.logs.glob("slurm-*.out"))


@pytest.fixture
def run(
    cluster: TestCluster,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Run:
    return Run(cluster, tmp_path / "hg38", monkeypatch, capsys)


def test_a_rank_that_is_frozen_is_named_and_a_chain_is_stopped_at_a_checkpoint(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.submit()
    run.submit(f"--dependency=afterany:{run.jobs[0]}")
    first, second = run.jobs
    run.becomes("running")
    assert until(lambda: run.status()["heartbeats"] == 2 and run.status()["seconds_left"], 30), run.status()
    found = run.status()
    assert (found["job"], found["job_state"], found["jobs_left"]) == (first, "RUNNING", 1)
    assert (found["ranks"], found["heartbeats"], found["restarts"]) == (2, 2, 0)
    assert found["oldest_heartbeat"] < 30 and found["max_steps"] == 100_000 and found["seconds_left"] > 60

    monkeypatch.setattr(heartbeat, "SILENT_S", 2.5)
    frozen = json.loads(run.paths.heartbeat(1).read_text())
    os.kill(frozen["pid"], signal.SIGSTOP)
    try:
        (hangs,) = run.becomes("hanging")["hanging"]
        assert (hangs["rank"], hangs["node"]) == (1, frozen["host"])
        assert frozen["host"] in run.cluster.run("scontrol", "show", "hostnames", found["nodes"]).split()
        assert f"rank 1 on {frozen['host']} has written no heartbeat" in run.status()["detail"]
    finally:
        os.kill(frozen["pid"], signal.SIGCONT)
    run.becomes("running")

    said = run.cancel()
    assert f"cancelled job {second}, in the queue" in said and f"rm {run.paths.stop} && " in said
    found = run.becomes("stopped")
    run.cluster.wait(first, {"FAILED"}, 30)  # exit code 75
    assert (run.cluster.show(first)["ExitCode"], run.cluster.state(second)) == ("75:0", "CANCELLED")
    found = run.status()
    assert (found["state"], found["job"], found["job_state"]) == ("stopped", first, "FAILED")
    assert found["checkpoint_step"] == found["step"] > 0
    assert run.cluster.show(first)["Restarts"] == "0" and "a STOP file in the run directory" in run.log()


def test_waiting_and_finished_runs_and_one_that_is_cancelled_at_once(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    run.submit("--hold")
    found = run.status()
    assert (found["state"], found["job_state"], found["job_reason"]) == ("waiting", "PENDING", "JobHeldUser")
    assert f"cancelled job {run.jobs[0]}, in the queue" in run.cancel()
    assert run.cluster.state(run.jobs[0]) == "CANCELLED" and not run.paths.stop.exists()
    assert cli.main(["cancel", str(run.paths.directory)]) == 1
    assert "waits or runs: it is not started (job" in capsys.readouterr().err

    run.submit(steps=3)
    run.cluster.wait(run.jobs[1], {"COMPLETED"}, 30)
    found = run.status()
    assert (found["state"], found["job_state"], found["checkpoint_step"]) == ("finished", "COMPLETED", 3)

    run.submit()
    run.becomes("running")
    assert f"cancelled job {run.jobs[2]}: SLURM ends it now" in run.cancel("--now")
    run.cluster.wait(run.jobs[2], {"CANCELLED"}, 30)
    assert not run.paths.stop.exists() and "no requeue from here" in run.log()
    assert run.status()["state"] in ("interrupted", "killed")
