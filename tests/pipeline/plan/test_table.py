"""`megabase train --dry-run`: the plan of a run, printed; nothing is started or written."""

import subprocess
import sys
from pathlib import Path

import pytest

from megabase.pipeline import cli
from tests.conftest import train_settings


def test_a_dry_run_prints_the_plan_and_writes_nothing(
    tmp_path: Path, lambda_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = train_settings(lambda_shards, tmp_path / "runs", "dry", "data.global_batch=100")
    assert cli.main(["train", "--dry-run", *settings, "data.micro_batch=1"]) == 0
    printed = capsys.readouterr().out
    rows = {line.split("  ")[0]: " ".join(line.split()) for line in printed.splitlines()}
    assert rows["global batch"] == "global batch 100 windows: 2 ranks x 1 of a micro batch x 50 accumulated"
    assert rows["windows of an epoch"] == "windows of an epoch 85 all training windows"
    assert rows["steps"] == "steps 40 47.1 epochs"
    assert rows["tokens of the run"] == "tokens of the run 2,048,000"
    assert rows["start"] == f"start step 0 a new run in {tmp_path}/runs/dry"
    assert "fits: cpu has" in rows["memory of a rank"]
    assert "limited by" in rows["time of a step"]
    assert "Hardware: cpu (this machine has no GPU" in printed
    assert "data.global_batch=100 is more than the 85 training windows" in printed
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_of_a_run_for_gpus_says_that_it_does_not_start_here(
    tmp_path: Path, lambda_shards: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    settings = [f"run.root={tmp_path}", "run.name=x", f"data.shards={lambda_shards}", "trainer.devices=8"]
    large = ["model.dim=4096", "model.depth=64", "data.global_batch=256"]
    assert cli.main(["train", *settings, *large, "--dry-run"]) == 2
    printed = capsys.readouterr()
    assert "on this machine it does not start: this machine has no GPU" in printed.err
    assert f"a new run in {tmp_path}/x" in printed.out


def test_a_dry_run_of_a_run_whose_checkpoints_are_gone_is_refused_as_a_start_is(
    tmp_path: Path, lambda_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "gone"
    run.mkdir()
    (run / "performance.jsonl").write_text('{"step": 20, "time": 1.0, "checkpoint_seconds": 0.1}\n')
    assert cli.main(["train", "--dry-run", *train_settings(lambda_shards, tmp_path, "gone")]) == 2
    printed = capsys.readouterr()
    assert "it does not start: the checkpoint of step 20 is gone" in printed.err
    assert "refused" in printed.out


@pytest.mark.slow
def test_a_dry_run_loads_neither_lightning_nor_deepspeed(tmp_path: Path, lambda_shards: Path) -> None:
    program = (
        "import sys; from megabase.pipeline import cli\n"
        "assert cli.main(sys.argv[1:]) == 0\n"
        "heavy = {'deepspeed', 'pytorch_lightning', 'mlflow'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    arguments = ["train", *train_settings(lambda_shards, tmp_path, "dry"), "--dry-run"]
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
