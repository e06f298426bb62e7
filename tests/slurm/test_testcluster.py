"""The test cluster starts, runs jobs on its nodes, loses nodes, reports errors, and leaves nothing behind."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megabase.slurm.testcluster import cluster as module
from megabase.slurm.testcluster.cluster import ClusterError, TestCluster, unavailable

needs_slurm = pytest.mark.skipif(unavailable() is not None, reason=f"no SLURM: {unavailable()}")


def alive(pid: int) -> bool:
    """Whether the process runs. A zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def job_script(directory: Path, body: str) -> str:
    script = directory / "job.sh"
    script.write_text(f"#!/bin/bash\n{body}\n")
    return str(script)


def test_without_slurm_the_error_names_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(module, "_SEARCH_PATH", str(tmp_path))
    reason = unavailable()
    assert reason is not None
    assert "slurmctld" in reason and "apt-get install slurm-wlm" in reason
    with pytest.raises(ClusterError, match="slurmctld"):
        TestCluster(tmp_path / "c").start()


@pytest.mark.parametrize("name", ["x" * 80, "with space", "percent%n", "hash#"])
def test_a_directory_that_slurm_cannot_use_is_refused(name: str) -> None:
    with pytest.raises(ClusterError, match="choose a directory"):
        TestCluster(Path("/tmp") / name)


def test_the_environment_of_another_job_does_not_leak(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_CONF", "SRUN_CPUS_PER_TASK", "SBATCH_PARTITION"):
        monkeypatch.setenv(name, "foreign")
    environment = TestCluster(tmp_path).environment
    assert environment.pop("SLURM_CONF") == f"{tmp_path}/slurm.conf"
    assert "foreign" not in environment.values()


@pytest.mark.slurm
def test_a_job_runs_on_both_nodes(cluster: TestCluster, tmp_path: Path) -> None:
    script = job_script(tmp_path, "srun bash -c 'echo $SLURM_PROCID on $SLURMD_NODENAME'")
    job = cluster.submit("--nodes=2", "--ntasks-per-node=1", "--output=log", script, cwd=tmp_path)
    assert cluster.wait(job, {"COMPLETED"}, timeout_s=30) == "COMPLETED"
    assert sorted((tmp_path / "log").read_text().split("\n")) == ["", "0 on n1", "1 on n2"]


@pytest.mark.slurm
def test_waiting_for_a_job_that_fails_raises_with_its_log(cluster: TestCluster, tmp_path: Path) -> None:
    job = cluster.submit(job_script(tmp_path, "echo the reason; exit 3"), cwd=tmp_path)
    with pytest.raises(ClusterError, match=r"(?s)FAILED \(exit code 3:0.*not COMPLETED.*the reason"):
        cluster.wait(job, {"COMPLETED"}, timeout_s=30)


@pytest.mark.slurm
def test_waiting_ends_after_its_timeout(cluster: TestCluster, tmp_path: Path) -> None:
    job = cluster.submit(job_script(tmp_path, "sleep 1000"), cwd=tmp_path)
    with pytest.raises(ClusterError, match="not COMPLETED"):
        cluster.wait(job, {"COMPLETED"}, timeout_s=0.3)
    cluster.run("scancel", str(job))
    cluster.wait(job, {"CANCELLED"}, timeout_s=30)


@pytest.mark.slurm
def test_a_refused_command_raises_with_what_slurm_says(cluster: TestCluster) -> None:
    with pytest.raises(ClusterError, match="invalid partition"):
        cluster.submit("--partition=nowhere", "--wrap=true")


@needs_slurm
@pytest.mark.slurm
def test_two_clusters_run_side_by_side_and_stop_ends_only_its_own(tmp_path: Path) -> None:
    first, second = TestCluster(tmp_path / "a"), TestCluster(tmp_path / "b")
    with first:
        with second:
            daemons = list(second.daemons())
            assert len(daemons) == 3
            jobs = [c.submit(job_script(tmp_path, "sleep 1000"), cwd=tmp_path) for c in (first, second)]
            assert jobs[0] != jobs[1]
            for each, job in zip((first, second), jobs, strict=True):
                each.wait(job, {"RUNNING"}, timeout_s=30)
            with pytest.raises(ClusterError, match="already"):
                second.start()
        assert not any(map(alive, daemons))
        assert first.state(jobs[0]) == "RUNNING"
    assert not list(first.daemons())


@needs_slurm
@pytest.mark.slurm
def test_stop_ends_the_processes_of_jobs(tmp_path: Path) -> None:
    with TestCluster(tmp_path / "c") as running:
        script = job_script(
            tmp_path, "trap '' TERM; echo $$ > pid.new; mv pid.new pid; sleep 1000; sleep 1000"
        )
        job = running.submit(script, cwd=tmp_path)
        running.wait(job, {"RUNNING"}, timeout_s=30)
        pid_file = tmp_path / "pid"
        assert module.until(pid_file.exists, 30)
        assert alive(int(pid_file.read_text()))
    assert not alive(int(pid_file.read_text()))


needs_munge = pytest.mark.skipif(unavailable(munge=True) is not None, reason=str(unavailable(munge=True)))


@needs_munge
@pytest.mark.slurm
def test_with_munge_a_job_survives_a_controller_that_restarts_and_loses_a_node(tmp_path: Path) -> None:
    with TestCluster(tmp_path / "c", munge=True) as running:
        assert f"socket={tmp_path}/c/munge/socket" in running.run("scontrol", "show", "config")
        script = job_script(tmp_path, "srun bash -c 'echo $$ > pid-$SLURMD_NODENAME.new; sleep 1000'")
        job = running.submit("--nodes=2", script, cwd=tmp_path)
        files = [tmp_path / f"pid-{node}.new" for node in running.nodes]
        assert module.until(lambda: all(file.exists() and file.read_text() for file in files), 30)
        tasks = [int(file.read_text()) for file in files]
        running.restart_controller()
        assert running.state(job) == "RUNNING"
        running.kill_node("n2")
        assert not alive(tasks[1]) and alive(tasks[0])
    assert not list(running.daemons())


@needs_slurm
@pytest.mark.slurm
def test_stop_finds_the_daemons_of_a_directory_that_is_gone(tmp_path: Path) -> None:
    with TestCluster(tmp_path / "c") as running:
        daemons = list(running.daemons())
        shutil.rmtree(running.directory)
    assert len(daemons) == 3
    assert not any(map(alive, daemons))


@needs_slurm
@pytest.mark.slurm
def test_a_failed_start_shows_the_logs_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # A node in the configuration for which no slurmd runs.
    configuration: Callable[..., str] = module.configuration
    monkeypatch.setattr(
        module,
        "configuration",
        lambda *arguments: configuration(*arguments) + "NodeName=n3 NodeAddr=127.0.0.1 CPUs=1 Port=1\n",
    )
    monkeypatch.setattr(module, "START_TIMEOUT_S", 1.0)
    broken = TestCluster(tmp_path / "c")
    with pytest.raises(ClusterError, match=r"(?s)not idle after 1 s.*slurmctld\.log:"):
        broken.start()
    assert not list(broken.daemons())


@needs_slurm
@pytest.mark.slurm
def test_as_a_program(tmp_path: Path) -> None:
    def call(action: str, *more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(module.__file__), action, str(tmp_path / "c"), *more]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    try:
        started = call("start", "--nodes=3")
        assert started.stdout == f"export SLURM_CONF={tmp_path}/c/slurm.conf\n", started.stderr
        environment = os.environ | {"SLURM_CONF": f"{tmp_path}/c/slurm.conf"}
        nodes = subprocess.run(
            ["sinfo", "-h", "-N", "-o", "%N"], env=environment, capture_output=True, text=True
        )
        assert set(nodes.stdout.split()) == {"n1", "n2", "n3"}
        assert call("kill-node", "n3").returncode == 0
        assert len(list(TestCluster(tmp_path / "c").daemons())) == 3
        again = call("start")
        assert again.returncode == 1
        assert "stop it first" in again.stderr
    finally:
        assert call("stop").returncode == 0
    assert not list(TestCluster(tmp_path / "c").daemons())
