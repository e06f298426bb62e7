"""The node that failed is named only where it is clear which one did."""

import json
from pathlib import Path

import pytest

from megabase.pipeline.slurm.failed_nodes import Heartbeat, failed_nodes, read_failed_nodes

# What srun of SLURM 22.05 printed.
KILLED = """\
srun: error: n2: task 1: Killed
srun: launch/slurm: _step_signal: Terminating StepId=40690.0
slurmstepd-n1: error: *** STEP 40690.0 ON n1 CANCELLED AT 2026-11-28T13:04:09 ***
srun: error: n1: task 0: Terminated
srun: Force Terminated StepId=40690.0
"""
LOST = """\
srun: error: Node failure on n4
srun: Job step aborted: Waiting up to 7 seconds for job step to finish.
srun: error: n3: task 0: Terminated
"""
WATCHDOG = """\
srun: error: n1: task 0: Exited with exit code 1
srun: launch/slurm: _step_signal: Terminating StepId=40692.0
srun: error: n2: task 1: Killed
"""
ALIVE = [Heartbeat("n1", 1000.0), Heartbeat("n2", 990.0), Heartbeat("n2", 975.0)]
N2_FROZEN = [Heartbeat("n1", 1000.0), Heartbeat("n2", 900.0)]


@pytest.mark.parametrize(
    ("messages", "heartbeats", "errors", "failed"),
    [
        ("", [], [], ""),
        (KILLED, ALIVE, [], "n2"),
        ("srun: error: n2: tasks 8-15: Bus error (core dumped)\n", ALIVE, [], "n2"),
        (LOST, [], [], "n4"),
        # The rank that exits first is not the one that hangs; srun then kills that one.
        (WATCHDOG, N2_FROZEN, [], "n2"),
        (WATCHDOG, ALIVE, [], ""),
        # An error of one node alone, and of both.
        (WATCHDOG, ALIVE, ["n1", "n1"], "n1"),
        (WATCHDOG, ALIVE, ["n1", "n2"], ""),
        # The job's own limit of memory, and an end by SLURM itself.
        ("srun: error: n2: task 1: Out Of Memory\n", ALIVE, [], ""),
        ("srun: error: n2: task 1: Terminated\n", ALIVE, [], ""),
    ],
)
def test_which_node_failed(
    messages: str, heartbeats: list[Heartbeat], errors: list[str], failed: str
) -> None:
    assert failed_nodes(messages, heartbeats, errors) == frozenset(failed.split())


def test_the_files_of_a_start_are_read_and_those_of_others_are_not(tmp_path: Path) -> None:
    start, run = tmp_path / "start", tmp_path / "run"
    start.mkdir()
    (run / "logs").mkdir(parents=True)
    assert read_failed_nodes(start, None, 0, False) == read_failed_nodes(start, run, 0, False) == frozenset()
    for rank, node, written in ((0, "n1", 1000.0), (1, "n2", 900.0), (2, "n3", 100.0)):
        heartbeat = {"rank": rank, "host": node, "written": written}
        (run / "logs" / f"rank-{rank}.heartbeat").write_text(json.dumps(heartbeat))
    (run / "logs" / "rank-3.heartbeat").write_text("{torn")
    assert read_failed_nodes(start, run, since=500, lost_only=False) == {"n2"}
    assert read_failed_nodes(start, run, since=950, lost_only=False) == frozenset()
    (start / "failed-1.json").write_text(json.dumps({"node": "n3"}))
    assert read_failed_nodes(start, run, since=950, lost_only=False) == {"n3"}
    (start / "srun.log").write_text(KILLED)
    assert read_failed_nodes(start, run, since=950, lost_only=False) == {"n2"}
    # At a time limit SLURM kills what has not ended: no node has failed, unless SLURM lost one.
    assert read_failed_nodes(start, run, since=500, lost_only=True) == frozenset()
    (start / "srun.log").write_text(KILLED + LOST)
    assert read_failed_nodes(start, run, since=500, lost_only=True) == {"n4"}
