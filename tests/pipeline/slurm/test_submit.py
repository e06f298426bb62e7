"""A config becomes the right sbatch call, a bad one is refused with a message, and sbatch's answer is parsed."""

import dataclasses
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from megabase.pipeline.config.schema import RunConfig
from megabase.pipeline.config.slurm import SlurmConfig
from megabase.pipeline.errors import UserError
from megabase.pipeline.slurm import submit
from megabase.pipeline.slurm.submit import TRAIN_SCRIPT, call_for, sbatch_call


def call(slurm: SlurmConfig | None = None, **changed: Any) -> list[str]:
    """A call for two nodes of four GPUs, with `changed` arguments."""
    arguments: dict[str, Any] = {
        "name": "genome",
        "nodes": 2,
        "tasks_per_node": 4,
        "gpus_per_node": 4,
        "run_dir": Path("/runs/genome"),
        "directory": Path("/home/me"),
        "script": Path("/lib/train.sbatch"),
        "arguments": ["/home/me/a.yaml", "optim.lr=0.01"],
    }
    return sbatch_call(slurm or SlurmConfig(), **(arguments | changed))


def test_the_shortest_call() -> None:
    assert call() == [
        *(
            "sbatch",
            "--parsable",
            "--job-name=genome",
            "--nodes=2",
            "--ntasks-per-node=4",
            "--gpus-per-node=4",
        ),
        *("--signal=USR1@120", "--chdir=/home/me", "--output=/runs/genome/logs/slurm-%j.out"),
        *("/lib/train.sbatch", "/home/me/a.yaml", "optim.lr=0.01"),
    ]


def test_a_call_with_every_setting() -> None:
    slurm = SlurmConfig(
        partition="gpu",
        account="lab",
        qos="long",
        constraint="nvlink",
        time="1-02:03:04",
        signal_seconds=600,
        cpus_per_task=12,
        mem="400G",
        gpus="h100",
        extra=["--exclusive", "--mail-type=FAIL"],
    )
    assert set(call(slurm)) - set(call()) == {
        *("--partition=gpu", "--account=lab", "--qos=long", "--constraint=nvlink", "--time=26:03:04"),
        *("--signal=USR1@600", "--cpus-per-task=12", "--mem=400G", "--gpus-per-node=h100:4"),
        *("--exclusive", "--mail-type=FAIL"),
    }


def test_every_setting_reaches_the_call() -> None:
    """A field without an effect on the call would be ignored silently."""
    changed: dict[str, Any] = {
        "signal_seconds": 61,
        "cpus_per_task": 3,
        "time": "01:00:00",
        "extra": ["--exclusive"],
    }
    for field in dataclasses.fields(SlurmConfig):
        value: Any = changed.get(field.name, "abc")
        slurm = dataclasses.replace(SlurmConfig(), **{field.name: value})
        assert call(slurm) != call(), field.name


def test_options_come_before_the_script_and_arguments_after() -> None:
    words = call(SlurmConfig(extra=["--exclusive"]))
    place = words.index("/lib/train.sbatch")
    assert all(word.startswith("--") for word in words[1:place])
    assert words[place + 1 :] == ["/home/me/a.yaml", "optim.lr=0.01"]


def test_a_run_on_cpus_asks_for_no_gpu() -> None:
    assert not [word for word in call(gpus_per_node=0) if word.startswith("--gpu")]


def test_a_percent_sign_in_the_run_directory_is_escaped() -> None:
    assert "--output=/runs/50%%/logs/slurm-%j.out" in call(run_dir=Path("/runs/50%"))


@given(st.integers(0, 500), st.integers(0, 59), st.integers(0, 59), st.booleans())
def test_a_time_limit_means_the_same_however_yaml_reads_it(
    hours: int, minutes: int, seconds: int, quoted: bool
) -> None:
    text = f"{hours}:{minutes:02}:{seconds:02}"
    yaml = f"time: '{text}'" if quoted else f"time: {text}"
    slurm = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(SlurmConfig), OmegaConf.create(yaml)))
    assert isinstance(slurm, SlurmConfig)
    slurm.signal_seconds = 1
    if hours * 3600 + minutes * 60 + seconds <= 1:
        with pytest.raises(UserError, match="never train"):
            call(slurm)
    else:
        assert f"--time={hours:02}:{minutes:02}:{seconds:02}" in call(slurm)


@pytest.mark.parametrize(
    "time", ["", "soon", "1:2:3", "24:00", "1-12", "24:60:00", "24:00:60", "-1", "1.5", "7\n"]
)
def test_a_time_limit_in_another_format_is_refused(time: str) -> None:
    with pytest.raises(UserError, match="HH:MM:SS"):
        call(SlurmConfig(time=time))


@pytest.mark.parametrize(
    ("slurm", "changed", "message"),
    [
        (SlurmConfig(time="00:02:00"), {}, "raise slurm.time"),
        (SlurmConfig(signal_seconds=0), {}, "1 to 65535"),
        (SlurmConfig(signal_seconds=65536), {}, "1 to 65535"),
        (SlurmConfig(extra=["--nice", "10"]), {}, "--option=value"),
        (SlurmConfig(), {"name": "bash"}, "choose another"),
        (SlurmConfig(), {"name": "interactive"}, "choose another"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    slurm: SlurmConfig, changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        call(slurm, **changed)


# -- what sbatch answers; a small program replaces sbatch


def fake_sbatch(monkeypatch: pytest.MonkeyPatch, directory: Path, body: str) -> None:
    program = directory / "sbatch"
    program.write_text(f"#!/bin/sh\n{body}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.parametrize("answer", ["123", "123;cluster2", "Welcome to the machine\\n\\n123"])
def test_the_job_id_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, answer: str) -> None:
    fake_sbatch(monkeypatch, tmp_path, f"printf '{answer}\\n'")
    assert submit.submit(call(script=TRAIN_SCRIPT), tmp_path / "run") == 123


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "echo 'sbatch: error: no such account' >&2; exit 1",
            r"sbatch refuses: sbatch: error: no such account$",
        ),
        ("echo 'error: Invalid generic resource (gres) specification' >&2; exit 1", r"set slurm\.gpus=null$"),
        ("exit 3", "exit code 3"),
        ("echo nonsense", "nonsense"),
    ],
)
def test_a_refusal_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, body: str, message: str
) -> None:
    fake_sbatch(monkeypatch, tmp_path, body)
    with pytest.raises(UserError, match=message) as error:
        submit.submit(call(script=TRAIN_SCRIPT), tmp_path / "runs" / "run")
    assert "\n" not in str(error.value)
    if "nonsense" not in body:  # then the job may run, and write its log
        assert [path.name for path in tmp_path.iterdir()] == ["sbatch"]


def test_a_refusal_leaves_a_run_that_was_there_as_it_was(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake_sbatch(monkeypatch, tmp_path, "exit 1")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "submit.sbatch").write_text("before")
    with pytest.raises(UserError):
        submit.submit(call(script=TRAIN_SCRIPT), tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["submit.sbatch"]
    assert (tmp_path / "run" / "submit.sbatch").read_text() == "before"


def test_without_sbatch_the_message_says_where_to_submit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(UserError, match="not on PATH"):
        submit.submit(call(script=TRAIN_SCRIPT), tmp_path / "run")


def test_the_run_directory_keeps_what_was_submitted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_sbatch(monkeypatch, tmp_path, "echo 1")
    words = call(script=TRAIN_SCRIPT, arguments=["a b.yaml", "run.name=it's"])
    submit.submit(words, tmp_path / "run")
    assert (tmp_path / "run" / "logs").is_dir()
    kept = (tmp_path / "run" / "submit.sbatch").read_text().split("\n")
    assert shlex.split(kept.pop(1).removeprefix("# ")) == words
    assert "\n".join(kept) == TRAIN_SCRIPT.read_text()


def test_the_job_gets_this_megabase_and_no_other_jobs_variables(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake_sbatch(monkeypatch, tmp_path, f"env > {tmp_path}/env; echo 1")
    monkeypatch.setenv("SLURM_NTASKS", "7")
    monkeypatch.setenv("SRUN_CPUS_PER_TASK", "7")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    submit.submit(call(script=TRAIN_SCRIPT), tmp_path / "run")
    seen = dict(line.split("=", 1) for line in (tmp_path / "env").read_text().splitlines() if "=" in line)
    assert "SLURM_NTASKS" not in seen and "SRUN_CPUS_PER_TASK" not in seen
    assert seen["SLURM_CONF"] == "/etc/slurm.conf"
    assert seen["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)


# -- from a config


def run_config(directory: Path, **trainer: Any) -> RunConfig:
    config = RunConfig()
    config.run.name, config.run.root = "genome", str(directory / "runs")
    for key, value in trainer.items():
        setattr(config.trainer, key, value)
    return config


def test_a_config_becomes_a_call_with_absolute_paths_of_its_files(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    config = run_config(tmp_path, nodes=2, devices=8)
    words, ranks = call_for(config, ["a b.yaml", "/etc/c.yaml"], ["optim.lr=0.1"])
    assert words[:2] == ["sbatch", "--parsable"]
    assert {"--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=8", f"--chdir={tmp_path}"} <= set(words)
    assert words[words.index(str(TRAIN_SCRIPT)) + 1 :] == [
        f"{tmp_path}/a b.yaml",
        "/etc/c.yaml",
        "optim.lr=0.1",
    ]
    assert ranks == 16


def test_gpus_null_requests_none(tmp_path: Path) -> None:
    config = run_config(tmp_path, nodes=1, devices=2)
    config.slurm.gpus = None
    assert not [word for word in call_for(config, [], [])[0] if word.startswith("--gpu")]


def test_the_number_of_ranks_on_a_node_is_required(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"trainer\.devices is not set"):
        call_for(run_config(tmp_path), [], [])


def test_the_script_is_valid_bash() -> None:
    assert subprocess.run(["bash", "-n", str(TRAIN_SCRIPT)], capture_output=True, text=True).stderr == ""
