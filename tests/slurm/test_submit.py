"""`megabase submit` on a real SLURM: the job runs, and the message of a refusal is printed."""

import os
import sys
from pathlib import Path

import pytest

from megabase.pipeline import cli
from megabase.pipeline.config.load import load
from megabase.pipeline.training import submission
from megabase.slurm.testcluster.cluster import TestCluster

pytestmark = pytest.mark.slurm


@pytest.fixture(autouse=True)
def no_check_of_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces the check of a training: it has its own tests, and these runs have no shards."""
    monkeypatch.setattr(submission, "check_submission", lambda config, call, ranks: [])


def settings(directory: Path, *more: str) -> list[str]:
    run = ["run.name=genome", f"run.root={directory / 'runs'}", "data.shards=s", "data.length=64"]
    return [*run, "trainer.nodes=2", "trainer.devices=1", "slurm.time=00:10:00", *more]


def test_a_submitted_run_runs(
    cluster: TestCluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    (bin_dir / "megabase").write_text(
        '#!/bin/sh\n[ "$1" = job-end ] && echo end 0 - || echo "rank $SLURM_PROCID in $PWD with $SEEN: $*"\n'
    )
    (bin_dir / "megabase").chmod(0o755)
    (tmp_path / "a b.yaml").write_text("optim: {lr: 0.2}\n")
    monkeypatch.setattr(sys, "executable", str(bin_dir / "python"))
    monkeypatch.setattr(os, "environ", cluster.environment)
    monkeypatch.chdir(tmp_path)

    assert cli.main(["submit", "a b.yaml", *settings(tmp_path)]) == 2
    assert "set slurm.gpus=null" in capsys.readouterr().err
    without_gpus = settings(tmp_path, "slurm.gpus=null", "slurm.setup=[export SEEN=setup]")
    # Nothing of the environment reaches the job: neither PATH nor a site's or a shell's PYTHONPATH.
    monkeypatch.setitem(os.environ, "SBATCH_EXPORT", "NONE")
    assert cli.main(["submit", "a b.yaml", *without_gpus]) == 0
    (tmp_path / "a b.yaml").write_text("optim: {lr: 0.3}\n")  # a change that the job must not see
    printed = capsys.readouterr().out
    job = int(printed.split()[1])
    log = Path(printed.split()[-1])
    cluster.wait(job, {"COMPLETED"}, timeout_s=30)
    run = tmp_path / "runs" / "genome"
    assert log.parent == run / "logs"
    for rank in (0, 1):
        line = f"rank {rank} in {tmp_path} with setup: train {run}/submit.yaml\n"
        assert (run / "logs" / f"slurm-{job}.0" / f"rank-{rank}.log").read_text() == line
    assert log.read_text() == f"rank 0 in {tmp_path} with setup: train {run}/submit.yaml\n"
    assert load([run / "submit.yaml"]).optim.lr == 0.2


def test_the_message_of_a_refusal_is_printed(
    cluster: TestCluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "environ", cluster.environment)
    nowhere = settings(tmp_path, "slurm.partition=nowhere", "slurm.gpus=null")
    assert cli.main(["submit", *nowhere]) == 2
    assert "invalid partition specified: nowhere" in capsys.readouterr().err


def test_training_runs_in_a_container(
    cluster: TestCluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A program called apptainer notes its arguments, and runs what follows the image."""
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    programs = {
        "apptainer": f'echo "$@" >> {tmp_path}/calls\nwhile [ "$1" != a.sif ]; do shift; done\nshift\nexec "$@"',
        "megabase": '[ "$1" = job-end ] && echo end 0 - || echo "trains with $2"',
    }
    for name, body in programs.items():
        (bin_dir / name).write_text(f"#!/bin/sh\n{body}\n")
        (bin_dir / name).chmod(0o755)
    monkeypatch.setattr(
        sys, "executable", str(bin_dir / "python")
    )  # whose directory is first on the job's PATH
    monkeypatch.setattr(os, "environ", cluster.environment | {"PATH": f"{bin_dir}:{os.environ['PATH']}"})
    monkeypatch.chdir(tmp_path)
    more = ["slurm.container=a.sif", "slurm.container_mounts=[/usr]", "trainer.nodes=1", "slurm.gpus=null"]
    assert cli.main(["submit", *settings(tmp_path, *more)]) == 0
    printed = capsys.readouterr().out
    cluster.wait(int(printed.split()[1]), {"COMPLETED"}, timeout_s=30)
    run = tmp_path / "runs" / "genome"
    assert f"trains with {run}/submit.yaml" in Path(printed.split()[-1]).read_text()
    calls = (tmp_path / "calls").read_text().splitlines()
    assert (
        calls[0]
        == f"exec --bind {tmp_path} --bind /usr --pwd {tmp_path} a.sif megabase train {run}/submit.yaml"
    )
    assert "a.sif megabase job-end" in calls[1] and len(calls) == 2
