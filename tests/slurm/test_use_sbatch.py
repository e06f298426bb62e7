"""slurm/use.sbatch on a real SLURM: two elements of two tasks each write what one process writes."""

import os
import sys
from pathlib import Path

import pytest

from megabase.pipeline import cli
from megabase.pipeline.inference import score
from megabase.slurm.testcluster.cluster import TestCluster
from tests.pipeline.inference.test_export import CONFIG, write_checkpoint

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "slurm" / "use.sbatch"

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

# Small tasks, so that every process has some.
PROGRAM = """
import sys
from megabase.pipeline import cli
from megabase.pipeline.inference import score

score.TASK_BASES = 1000
sys.exit(cli.main())
"""


def test_an_array_writes_what_one_process_writes(
    cluster: TestCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(score, "TASK_BASES", 1000)  # here, too: rows of one batch depend on it
    write_checkpoint(tmp_path / "run", CONFIG, 5)
    assert cli.main(["export", str(tmp_path / "run"), str(tmp_path / "model")]) == 0
    fasta = tmp_path / "genome.fa"
    fasta.write_text("".join(f">r{number}\n{'ACGGTTA' * (100 + number)}\n" for number in range(9)))
    program = tmp_path / "bin" / "megabase"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -P {program}.py "$@"\n')
    program.with_suffix(".py").write_text(PROGRAM)
    program.chmod(0o755)
    environment = {"PATH": f"{program.parent}:{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": ""}
    command = ["score", str(tmp_path / "model"), str(fasta), "-o"]
    options = [
        "--array=3-4",
        "--ntasks-per-node=2",
        "--cpus-per-task=1",
        f"--output={tmp_path / 'log-%a.out'}",
    ]
    job = cluster.submit(*options, str(SCRIPT), *command, str(tmp_path / "shared.parquet"), env=environment)
    assert cli.main([*command, str(tmp_path / "one.parquet")]) == 0
    cluster.wait(job, {"COMPLETED"}, 240)
    logs = "".join(path.read_text() for path in tmp_path.glob("log-*.out"))
    assert logs.count("bits per base") == 1, logs
    assert (tmp_path / "shared.parquet").read_bytes() == (tmp_path / "one.parquet").read_bytes()
    assert not (tmp_path / "shared.parquet.partial").exists()
