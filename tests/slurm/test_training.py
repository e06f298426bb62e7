"""Training on a real SLURM, on two nodes: told to stop, queued again, and finished as if nothing had been."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import checkpoint
from slurm.testcluster.cluster import TestCluster, until
from tests.conftest import STEPS, train_settings, training_rows

pytestmark = [pytest.mark.slurm, pytest.mark.distributed, pytest.mark.slow]


def megabase(cluster: TestCluster, *arguments: str) -> str:
    """What `megabase ARGUMENTS` prints, run as on a login node of the cluster."""
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.cli", *arguments],
        env=os.environ | cluster.environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_two_node_job_is_signalled_requeued_and_finishes_the_same_run(
    cluster: TestCluster, undisturbed: Path, runs: Path, lambda_shards: Path
) -> None:
    settings = train_settings(
        lambda_shards, runs, "nodes", "trainer.nodes=2", "trainer.devices=1", "slurm.gpus=null"
    )
    run = runs / "nodes"
    assert "--nodes=2" in megabase(cluster, "submit", *settings, "--dry-run")
    assert not run.exists()

    job = int(megabase(cluster, "submit", *settings).split()[1])
    assert until(lambda: len(training_rows(run)) >= 8, 240), (run / "logs" / f"slurm-{job}.out").read_text()
    cluster.signal(job, "USR1")
    cluster.wait(job, {"COMPLETED"}, 400)

    assert cluster.show(job)["Restarts"] == "1"
    log = (run / "logs" / f"slurm-{job}.out").read_text()
    assert "back in the queue" in log and "resuming nodes from" in log
    assert [row["step"] for row in training_rows(run)] == list(range(1, STEPS + 1))
    # One node with two ranks or two nodes with one each, interrupted or not: the same bytes.
    assert (run / "metrics.jsonl").read_bytes() == (undisturbed / "metrics.jsonl").read_bytes()
    assert (run / "submit.sbatch").read_text().startswith("#!/bin/bash\n# sbatch --parsable")
    assert checkpoint.verify(run / "checkpoints" / f"step-{STEPS}") is None
