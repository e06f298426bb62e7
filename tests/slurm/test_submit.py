"""`megabase submit` on a real SLURM: the job runs, and the message of a refusal is printed."""

import os
import sys
from pathlib import Path

import pytest

from megabase.pipeline import cli
from megabase.pipeline.training import check
from megabase.slurm.testcluster.cluster import TestCluster

pytestmark = pytest.mark.slurm


@pytest.fixture(autouse=True)
def no_check_of_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces the check of a training: it has its own tests, and these runs have no shards."""
    monkeypatch.setattr(check, "check", lambda config, ranks: None)


def settings(directory: Path, *more: str) -> list[str]:
    run = ["run.name=genome", f"run.root={directory / 'runs'}", "data.shards=s", "data.length=64"]
    return [*run, "trainer.nodes=2", "trainer.devices=1", "slurm.time=00:10:00", *more]


def test_a_submitted_run_runs(
    cluster: TestCluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    (bin_dir / "megabase").write_text('#!/bin/sh\necho "rank $SLURM_PROCID in $PWD: $*"\n')
    (bin_dir / "megabase").chmod(0o755)
    (tmp_path / "a b.yaml").write_text("optim: {lr: 0.2}\n")
    monkeypatch.setattr(sys, "executable", str(bin_dir / "python"))
    monkeypatch.setattr(os, "environ", cluster.environment)
    monkeypatch.chdir(tmp_path)

    assert cli.main(["submit", "a b.yaml", *settings(tmp_path)]) == 2
    assert "set slurm.gpus=null" in capsys.readouterr().err
    without_gpus = settings(tmp_path, "slurm.gpus=null", "optim.lr=0.1")
    assert cli.main(["submit", "a b.yaml", *without_gpus]) == 0
    printed = capsys.readouterr().out
    job = int(printed.split()[1])
    log = Path(printed.split()[-1])
    cluster.wait(job, {"COMPLETED"}, timeout_s=30)
    assert log.parent == tmp_path / "runs" / "genome" / "logs"
    words = " ".join(without_gpus)
    lines = {f"rank {rank} in {tmp_path}: train {tmp_path}/a b.yaml {words}" for rank in (0, 1)}
    assert lines <= set(log.read_text().splitlines())


def test_the_message_of_a_refusal_is_printed(
    cluster: TestCluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "environ", cluster.environment)
    nowhere = settings(tmp_path, "slurm.partition=nowhere", "slurm.gpus=null")
    assert cli.main(["submit", *nowhere]) == 2
    assert "invalid partition specified: nowhere" in capsys.readouterr().err
