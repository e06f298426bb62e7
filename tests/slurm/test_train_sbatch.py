"""slurm/train.sbatch on a real SLURM: signals reach the tasks, and jobs are requeued when they should be, only then.

Here, `megabase` is a small program that follows a plan. For each start of the job (SLURM_RESTART_COUNT) and each rank,
the plan says what to wait for, what to write to the status file and how to exit. The program writes to records/ which
arguments, variables and signals it got.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megabase.pipeline.slurm.script import TRAIN_SCRIPT
from megabase.slurm.testcluster.cluster import TestCluster, until
from megabase.slurm.testcluster.configuration import CPUS

pytestmark = pytest.mark.slurm
ROOT = Path(__file__).parents[2]

MEGABASE = """\
import json, os, pathlib, signal, sys, time

if sys.argv[1] == "job-end":  # decided by megabase itself
    os.environ["PYTHONPATH"] = ROOT
    os.execv(sys.executable, [sys.executable, "-P", "-m", "megabase.pipeline.cli", *sys.argv[1:]])
start, rank = int(os.environ.get("SLURM_RESTART_COUNT", 0)), int(os.environ["SLURM_PROCID"])
home = pathlib.Path(__file__).parent
part = json.loads((home / "plan.json").read_text())[start][rank]
folder = "-".join(["records", *([os.environ["SLURM_ARRAY_TASK_ID"]] if "SLURM_ARRAY_TASK_ID" in os.environ else [])])
(home / folder).mkdir(exist_ok=True)
records = [home / f"{folder}/{start}-{each}.json" for each in range(int(os.environ["SLURM_NTASKS"]))]
record = records[rank]
caught = []


def write():
    seen = {"argv": sys.argv[1:], "caught": caught, "cwd": os.getcwd(), "env": dict(os.environ)}
    record.with_suffix(".new").write_text(json.dumps(seen))
    record.with_suffix(".new").rename(record)


def agreed():
    # As in a training: the ranks exit when all of them have got the signal.
    return caught and all(each.exists() and json.loads(each.read_text())["caught"] for each in records)


def handler(number, frame):
    caught.append(signal.Signals(number).name)
    write()


for name in part.get("handles", ["SIGUSR1"]):
    signal.signal(signal.Signals[name], handler)
write()
print(f"start {start} rank {rank}", flush=True)
while part.get("waits") and not agreed():
    time.sleep(0.02)
if "checkpoint" in part:
    (home / f"run \u00fc/checkpoints/step-{part['checkpoint']}").mkdir(parents=True, exist_ok=True)
if state := part.get("state"):
    status = pathlib.Path(os.environ["MEGABASE_STATUS_FILE"])
    content = {"state": state, "step": 7, "checkpoints": str(home / "run \u00fc/checkpoints")}
    status.with_suffix(".new").write_text(json.dumps(content) + "\\n")
    status.with_suffix(".new").rename(status)
time.sleep(part.get("lingers", 0))
sys.exit(part.get("code", 0))
"""

DONE = {"state": "finished"}


class Job:
    """A submitted train.sbatch whose `megabase` follows `plan`: plan[start][rank]."""

    def __init__(
        self,
        cluster: TestCluster,
        home: Path,
        plan: list[list[dict[str, Any]]],
        *options: str,
        max_stalls: int = 1,
    ) -> None:
        self.cluster, self.home, self.ranks = cluster, home, range(len(plan[0]))
        (home / "records").mkdir()
        (home / "plan.json").write_text(json.dumps(plan))
        program = home / "megabase"
        program.write_text(f"#!{sys.executable}\nROOT = {str(ROOT)!r}\n{MEGABASE}")
        program.chmod(0o755)
        search_path = f"{home}{os.pathsep}{os.environ['PATH']}"
        output = "--output=log-%a" if any("--array" in option for option in options) else "--output=log"
        options = (f"--nodes={len(plan[0])}", output, *options)
        self.id = cluster.submit(
            *options,
            *(str(TRAIN_SCRIPT), "a b.yaml", "run.name=x"),
            cwd=home,
            env={
                "PATH": search_path,
                "MEGABASE_MAX_STALLS": str(max_stalls),
                "PYTHONPATH": "/nowhere",
            },
        )

    def wait_for_handlers(self) -> None:
        """Wait until the tasks of the first start have their signal handlers."""
        files = [self.home / f"records/0-{rank}.json" for rank in self.ranks]
        assert until(lambda: all(file.exists() for file in files), 30), self.log()

    def record(self, start: int, rank: int) -> dict[str, Any]:
        """What a task wrote to records/."""
        record: dict[str, Any] = json.loads((self.home / f"records/{start}-{rank}.json").read_text())
        return record

    def caught(self, start: int) -> list[list[str]]:
        """The signals that each rank got in a start."""
        return [self.record(start, rank)["caught"] for rank in self.ranks]

    def ends(self, state: str, *, restarts: int, code: str = "0:0", timeout_s: float = 60) -> None:
        """Wait for the end, and check it."""
        self.cluster.wait(self.id, {state}, timeout_s)
        shown = self.cluster.show(self.id)
        assert (shown["Restarts"], shown["ExitCode"]) == (str(restarts), code), self.log()
        assert not list(self.home.glob("log*.json"))  # the record between starts

    def log(self) -> str:
        return (self.home / "log").read_text()


@pytest.fixture
def start(cluster: TestCluster, tmp_path: Path) -> Iterator[Callable[..., Job]]:
    """Submits a plan. At the end all jobs are cancelled, so that a failed test leaves the nodes to the next one."""
    yield lambda plan, *options, **more: Job(cluster, tmp_path, plan, *options, **more)
    cluster.clear()


def test_a_signal_stops_both_tasks_and_the_job_goes_on(
    cluster: TestCluster, start: Callable[..., Job]
) -> None:
    stops = {"waits": True}
    job = start([[{**stops, "state": "again", "code": 75}, stops], [DONE, {}]], f"--cpus-per-task={CPUS}")
    job.wait_for_handlers()
    cluster.signal(job.id, "USR1")
    job.ends("COMPLETED", restarts=1)

    records = {(s, rank): job.record(s, rank) for s in (0, 1) for rank in (0, 1)}
    assert job.caught(0) == [["SIGUSR1"], ["SIGUSR1"]]
    assert job.caught(1) == [[], []]
    for (_, rank), record in records.items():
        env = record["env"]
        assert record["argv"] == ["train", "a b.yaml", "run.name=x"]
        assert record["cwd"] == str(job.home)
        # The variables that Lightning's SLURMEnvironment and our ranks read.
        assert env["SLURM_PROCID"] == env["SLURM_NODEID"] == str(rank)
        assert env["SLURM_LOCALID"] == "0"
        assert env["SLURM_NTASKS"] == env["SLURM_NNODES"] == "2"
        assert env["SLURM_NTASKS_PER_NODE"] == "1"
        assert env["SLURM_JOB_NAME"] == "megabase"
        assert "SLURM_STEP_ID" in env
        assert env["OMP_NUM_THREADS"] == env["SLURM_CPUS_PER_TASK"] == str(CPUS)
        # The nodes' names do not resolve here, so the address is used. Rank 0 chooses the port.
        assert env["MASTER_ADDR"] == "127.0.0.1" and "MASTER_PORT" not in env
        assert "PYTHONPATH" not in env
    # Every rank and start has a file; the job's log has rank 0's lines as well.
    for number in (0, 1):
        folder = job.home / f"log-{job.id}.{number}"  # --output=log does not have the id
        assert records[number, 0]["env"]["MEGABASE_MEETING_FILE"] == str(folder / "meeting.json")
        for rank in (0, 1):
            assert (folder / f"rank-{rank}.log").read_text() == f"start {number} rank {rank}\n"
    log = job.log()
    for line, count in (("start 0 rank 0", 1), ("start 1 rank 0", 1), ("rank 1", 0)):
        assert log.count(line) == count, log


def test_a_killed_task_hides_nothing_and_starts_without_progress_have_a_limit(
    start: Callable[..., Job],
) -> None:
    # Rank 1 exits first. srun kills rank 0, which has written "again" but not exited: srun's code is not 75.
    plan = [[{"state": "again", "lingers": 60}, {"code": 75, "lingers": 0.5}]] * 2
    job = start(plan)
    job.ends("FAILED", restarts=1, code="75:0")
    assert "checkpointed, 2 times without a checkpoint (slurm.max_stalls=1): not started again" in job.log()


def test_a_failure_ends_the_job(start: Callable[..., Job]) -> None:
    # srun kills rank 1 and exits with 143; the exit code of the job is still that of the failed rank.
    job = start([[{"code": 1, "state": "failed"}, {"waits": True}]])
    job.ends("FAILED", restarts=0, code="1:0")
    assert "ended with code 1 (failed); not started again" in job.log()


def test_a_crash_after_a_checkpoint_starts_the_job_again_but_not_forever(start: Callable[..., Job]) -> None:
    # Killed after a checkpoint; crashed after a newer one; crashed twice without a new one, the second time before it
    # wrote a status.
    plan = [
        [{"state": "running", "checkpoint": 10, "code": 137}],
        [{"state": "crashed", "checkpoint": 20, "code": 1}],
        [{"state": "crashed", "code": 1}],
        [{"code": 1}],
    ]
    job = start(plan)
    job.ends("FAILED", restarts=3, code="1:0", timeout_s=120)
    log = job.log()
    assert log.count("back in the queue") == 3
    assert "ended with code 1, 2 times after the checkpoint of step 20 (slurm.max_stalls=1)" in log


def test_a_stop_file_and_a_failure_that_would_repeat_end_the_job(
    cluster: TestCluster, tmp_path: Path
) -> None:
    messages = {
        "stopped": "a STOP file in the run directory stopped training: not started again",
        "failed": "ended with code 1 (failed); not started again",
    }
    jobs = {}
    for state, code in (("stopped", 75), ("failed", 1)):
        (tmp_path / state).mkdir()
        jobs[state] = Job(cluster, tmp_path / state, [[{"state": state, "checkpoint": 10, "code": code}]])
    for state, code in (("stopped", 75), ("failed", 1)):
        jobs[state].ends("FAILED", restarts=0, code=f"{code}:0")
        assert messages[state] in jobs[state].log()
    cluster.clear()


def test_bad_input_ends_the_job(start: Callable[..., Job]) -> None:
    job = start([[{"code": 2}]])
    job.ends("FAILED", restarts=0, code="2:0")
    assert "ended with code 2; not started again" in job.log()


def test_a_limit_that_is_no_number_is_found_before_training(
    start: Callable[..., Job],
) -> None:
    job = start([[DONE]], "--export=ALL,MEGABASE_MAX_STALLS=many")
    job.ends("FAILED", restarts=0, code="2:0")
    assert "MEGABASE_MAX_STALLS=many: must be a whole number" in job.log()
    assert not list((job.home / "records").iterdir())


def test_a_rank_that_dies_alone_ends_the_others_and_the_job(start: Callable[..., Job]) -> None:
    job = start([[{"waits": True}, {"code": 1}]], max_stalls=0)
    job.cluster.wait(job.id, {"FAILED"}, timeout_s=30)
    assert job.cluster.show(job.id)["Restarts"] == "0"


def test_finished_stays_finished_when_a_rank_fails_at_exit(start: Callable[..., Job]) -> None:
    job = start([[DONE, {"code": 139, "lingers": 0.5}]])
    job.ends("COMPLETED", restarts=0)
    assert "srun exited with code" in job.log()


def test_a_cancelled_job_stays_cancelled(cluster: TestCluster, start: Callable[..., Job]) -> None:
    stops = {"waits": True, "handles": ["SIGTERM"], "code": 75, "state": "again"}
    job = start([[stops], [DONE]])
    job.wait_for_handlers()
    cluster.run("scancel", str(job.id))
    cluster.wait(job.id, {"CANCELLED"}, timeout_s=30)
    # It stopped at a checkpoint and could have been requeued.
    assert job.caught(0) == [["SIGTERM"]]
    assert "no requeue from here" in job.log()


def test_the_batch_shell_survives_a_signal_to_everything(
    cluster: TestCluster, start: Callable[..., Job]
) -> None:
    job = start([[{"waits": True, "code": 75, "state": "again"}], [DONE]])
    job.wait_for_handlers()
    cluster.run("scancel", "--full", "--signal=USR1", str(job.id))
    job.ends("COMPLETED", restarts=1)


def test_a_preempted_job_goes_on(cluster: TestCluster, start: Callable[..., Job]) -> None:
    # Rank 1 exits first. srun then ends rank 0, which is still working and gets SIGTERM a second time.
    stops = {"waits": True, "handles": ["SIGTERM"], "code": 75}
    job = start([[{**stops, "state": "again", "lingers": 1}, stops], [DONE, {}]])
    job.wait_for_handlers()
    urgent = cluster.submit("--partition=urgent", "--nodes=4", "--exclusive", "--wrap=true", cwd=job.home)
    cluster.wait(urgent, {"COMPLETED"}, timeout_s=30)
    job.ends("COMPLETED", restarts=1)
    assert [set(signals) for signals in job.caught(0)] == [{"SIGTERM"}, {"SIGTERM"}]


def test_preemptions_after_checkpoints_are_not_counted(
    cluster: TestCluster, start: Callable[..., Job]
) -> None:
    starts = 3
    stops = {"waits": True, "handles": ["SIGTERM"], "code": 75, "state": "again"}
    job = start([*([{**stops, "checkpoint": 10 + number}] for number in range(starts)), [DONE]], max_stalls=0)
    for number in range(starts):
        record = job.home / f"records/{number}-0.json"
        assert until(record.exists, 60), job.log()
        urgent = cluster.submit("--partition=urgent", "--nodes=4", "--exclusive", "--wrap=true", cwd=job.home)
        cluster.wait(urgent, {"COMPLETED"}, timeout_s=30)
    job.ends("COMPLETED", restarts=starts)


def test_one_element_of_an_array_starts_again_alone(cluster: TestCluster, start: Callable[..., Job]) -> None:
    """The element with the id of the whole array is the one to watch: scontrol takes that id for all elements."""
    waits = {"waits": True, "state": "again", "code": 75}
    job = start([[waits], [DONE]], "--array=0-1")
    tasks = cluster.run("squeue", "--noheader", "--array", "--format=%A %a").split("\n")
    assert until(lambda: len(list(job.home.glob("records-*/0-0.json"))) == 2, 30), tasks
    cluster.run("scancel", "--signal=USR1", f"{job.id}_0")
    assert until((job.home / "records-0" / "1-0.json").exists, 60)
    assert not (job.home / "records-1" / "1-0.json").exists()
    cluster.run("scancel", "--signal=USR1", f"{job.id}_1")
    assert until((job.home / "records-1" / "1-0.json").exists, 60)


def test_a_lost_node_starts_the_job_again(cluster: TestCluster, start: Callable[..., Job]) -> None:
    job = start([[{"waits": True}, {"waits": True}], [DONE, {}]])
    job.wait_for_handlers()
    cluster.run("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=test")
    job.ends("COMPLETED", restarts=1)


@pytest.mark.slow
def test_time_limits(cluster: TestCluster, tmp_path: Path) -> None:
    """SLURM checks limits every half minute, so these two jobs wait at the same time."""
    stops = {"waits": True, "code": 75, "state": "again"}
    plans: dict[str, tuple[list[list[dict[str, Any]]], str]] = {
        # SIGUSR1 before the limit.
        "ahead": ([[stops], [DONE]], "--signal=USR1@60"),
        # No SIGUSR1: SIGTERM at the limit is the first signal, and the checkpoint is complete before SIGKILL.
        "late": ([[{**stops, "handles": ["SIGTERM"]}], [DONE]], "--signal=USR1@0"),
    }
    jobs = {}
    for name, (plan, option) in plans.items():
        (tmp_path / name).mkdir()
        jobs[name] = Job(cluster, tmp_path / name, plan, "--time=1", option)
    for job in jobs.values():
        job.ends("COMPLETED", restarts=1, timeout_s=240)
    assert jobs["ahead"].caught(0) == [["SIGUSR1"]]
    assert jobs["late"].caught(0)[0][0] == "SIGTERM"
