"""Training on a real SLURM, on two nodes: stopped by a signal, killed, requeued each time, and exact to the end."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megabase.pipeline.checkpoint.damage import find_damage
from megabase.slurm.testcluster.cluster import TestCluster, until
from tests.conftest import STEPS, train_settings, training_rows

pytestmark = [pytest.mark.slurm, pytest.mark.distributed, pytest.mark.slow]


def megabase(cluster: TestCluster, *arguments: str) -> str:
    """What `megabase ARGUMENTS` prints, run as on a login node of the cluster."""
    done = subprocess.run(
        [sys.executable, "-m", "megabase.pipeline.cli", *arguments],
        env=os.environ | cluster.environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def process_of(run: Path, rank: int) -> int:
    """Process id of a rank, from its heartbeat."""
    return int(json.loads((run / "logs" / f"rank-{rank}.heartbeat").read_text())["pid"])


def test_a_two_node_job_is_signalled_killed_and_finishes_the_same_run(
    cluster: TestCluster, undisturbed: Path, runs: Path, lambda_shards: Path
) -> None:
    settings = train_settings(
        lambda_shards,
        runs,
        "nodes",
        *("trainer.nodes=2", "trainer.devices=1", "slurm.gpus=null", "slurm.copy_code=true"),
    )
    run = runs / "nodes"
    assert "--nodes=2" in megabase(cluster, "submit", *settings, "--dry-run")
    assert not run.exists()

    job = int(megabase(cluster, "submit", *settings).split()[1])
    output = run / "logs" / f"slurm-{job}.out"
    assert until(lambda: len(training_rows(run)) >= 8, 240), output.read_text()
    before = process_of(run, 1)
    cluster.signal(job, "USR1")

    # In the second start a rank is killed by a signal that it cannot catch, as when a node runs out of memory.
    def has_resumed() -> bool:
        return process_of(run, 1) != before and len(training_rows(run)) >= 18

    assert until(has_resumed, 240), output.read_text()
    os.kill(process_of(run, 1), signal.SIGKILL)
    cluster.wait(job, {"COMPLETED"}, 400)

    assert cluster.show(job)["Restarts"] == "2"
    log = output.read_text()
    assert "checkpointed; back in the queue (restart 1" in log
    # "crashed" if rank 0 noticed its broken connection before srun killed it.
    assert re.search(r"ended with code \d+ \((running|crashed)\); back in the queue \(restart 2", log), log
    assert log.count("resuming nodes from") == 2
    assert [row["step"] for row in training_rows(run)] == list(range(1, STEPS + 1))
    # The undisturbed run has two ranks on one node; this one, two nodes of one rank, was interrupted: the same bytes.
    assert (run / "metrics.jsonl").read_bytes() == (undisturbed / "metrics.jsonl").read_bytes()
    assert (run / "submit.sbatch").read_text().startswith("#!/bin/bash\n# sbatch --parsable")
    assert find_damage(run / "checkpoints" / f"step-{STEPS}") is None
