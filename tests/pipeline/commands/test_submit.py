"""`megabase submit`: the training is checked first; a dry run prints the call and writes nothing."""

import shlex
from pathlib import Path

import pytest

from megabase.pipeline import cli
from megabase.pipeline.config.schema import RunConfig
from megabase.pipeline.errors import UserError
from megabase.pipeline.training import submission
from megabase.pipeline.training.submission import Finding

SETTINGS = ["run.name=genome", "data.shards=s", "data.length=64", "trainer.nodes=2", "trainer.devices=8"]


def test_a_dry_run_prints_a_line_for_the_shell_and_writes_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checked: list[tuple[str, int]] = []

    def check(config: RunConfig, call: list[str], ranks: int) -> list[Finding]:
        checked.append((config.trainer.precision, ranks))
        return [Finding("disk", "room"), Finding("MLflow", "away", warning=True)]

    monkeypatch.setattr(submission, "check_submission", check)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a b.yaml").write_text("optim: {lr: 0.2}\n")
    assert cli.main(["submit", "a b.yaml", *SETTINGS, "--dry-run"]) == 0
    call, _, settings = capsys.readouterr().out.partition("\n\n")
    words = shlex.split(call)
    assert words[:2] == ["sbatch", "--parsable"] and "--nodes=2" in words
    assert words[-1] == f"{tmp_path}/runs/genome/submit.yaml"
    assert "MAX_STALLS=3" in settings.splitlines()
    assert settings.endswith("\n\nChecked:\ndisk:          room\nMLflow:        away\n")
    assert checked == [("bf16", 16)]  # where the job runs there are GPUs
    assert [path.name for path in tmp_path.iterdir()] == ["a b.yaml"]


def test_a_dry_run_of_a_chain_prints_its_commands(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(submission, "check_submission", lambda config, call, ranks: [])
    monkeypatch.chdir(tmp_path)
    assert cli.main(["submit", *SETTINGS, "--dry-run", "--chain", "3"]) == 0
    commands, _, script = capsys.readouterr().out.partition("\n\n")
    run = tmp_path / "runs" / "genome"
    files = f"{run}/submit.sbatch {run}/submit.yaml"
    ends = ["--hold", "--dependency=afterany:JOB1", "--dependency=afterany:JOB2"]
    lines = commands.split("\n")
    assert [line.partition(" --no-requeue ")[2] for line in lines[:3]] == [f"{end} {files}" for end in ends]
    assert lines[3:] == ["scontrol release JOB1"]
    assert f"CHAIN={run}/job.json" in script.splitlines()
    assert cli.main(["submit", *SETTINGS, "--chain", "0"]) == 2
    assert capsys.readouterr().err == "megabase: --chain=0: must be 1 or more\n"


def test_a_training_that_could_not_run_is_not_submitted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(config: RunConfig, call: list[str], ranks: int) -> None:
        raise UserError("this cannot run")

    monkeypatch.setattr(submission, "check_submission", refuse)
    monkeypatch.chdir(tmp_path)
    sbatch = tmp_path / "sbatch"
    sbatch.write_text("#!/bin/sh\ntouch submitted\necho 1\n")
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert cli.main(["submit", *SETTINGS]) == 2
    assert capsys.readouterr().err == "megabase: this cannot run\n"
    assert [path.name for path in tmp_path.iterdir()] == ["sbatch"]


def test_what_does_not_fit_is_submitted_only_by_force(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [Finding("plan", "the run does not fit", warning=True, fatal=True)]
    monkeypatch.setattr(submission, "check_submission", lambda config, call, ranks: found)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["submit", *SETTINGS, "--dry-run"]) == 2
    assert capsys.readouterr().err == "megabase: the run does not fit\n"
    assert cli.main(["submit", *SETTINGS, "--dry-run", "--force"]) == 0
    assert "plan:          the run does not fit" in capsys.readouterr().out
