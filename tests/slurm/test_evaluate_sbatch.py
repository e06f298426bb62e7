"""slurm/evaluate.sbatch on a real SLURM: two nodes give the numbers of one process."""

import json
import os
import sys
from pathlib import Path

import pytest

from megabase.pipeline import cli
from megabase.slurm.testcluster.cluster import TestCluster
from tests.pipeline.inference.test_export import CONFIG, write_checkpoint

SCRIPT = Path(__file__).parents[2] / "slurm" / "evaluate.sbatch"

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


def submit(cluster: TestCluster, folder: Path, *arguments: str) -> tuple[int, Path]:
    """Submit the script to both nodes; returns the job and its log. `megabase` is this interpreter's."""
    program = folder / "bin" / "megabase"
    program.parent.mkdir(exist_ok=True)
    root = Path(__file__).parents[2]
    program.write_text(
        f'#!/bin/sh\nPYTHONPATH={root} exec {sys.executable} -P -m megabase.pipeline.cli "$@"\n'
    )
    program.chmod(0o755)
    environment = {"PATH": f"{program.parent}:{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": ""}
    log = folder / "evaluate.out"
    more = ["--nodes=2", "--ntasks-per-node=1", f"--output={log}", str(SCRIPT), *arguments]
    return cluster.submit(*more, env=environment), log


def test_two_nodes_give_the_numbers_of_one_process(
    cluster: TestCluster, lambda_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(tmp_path / "run", CONFIG, 5)
    more = ["--split", "valid", "--shards", str(lambda_shards), "--length", "256", "--recall", "2"]
    job, log = submit(cluster, tmp_path, str(tmp_path / "run"), *more, "--output", str(tmp_path / "out"))
    assert cli.main(["evaluate", str(tmp_path / "run"), *more, "--json"]) == 0
    one = json.loads(capsys.readouterr().out)
    cluster.wait(job, {"COMPLETED"}, 240)
    two = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert two == one, log.read_text()
    assert log.read_text().count("scoring 18 windows") == 1


def test_bad_input_is_reported_once_and_ends_the_job(
    cluster: TestCluster, lambda_shards: Path, tmp_path: Path
) -> None:
    job, log = submit(cluster, tmp_path, str(tmp_path / "none"), "--shards", str(lambda_shards))
    cluster.wait(job, {"FAILED"}, 240)
    assert log.read_text().count("holds no model: give a run directory") == 1
