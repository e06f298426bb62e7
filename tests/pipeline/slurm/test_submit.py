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

from megabase.pipeline.config.load import load
from megabase.pipeline.config.schema import RunConfig
from megabase.pipeline.config.slurm import SlurmConfig
from megabase.pipeline.errors import UserError
from megabase.pipeline.slurm import submit
from megabase.pipeline.slurm.queue import read_jobs
from megabase.pipeline.slurm.script import TRAIN_SCRIPT
from megabase.pipeline.slurm.submit import at_the_job, call_for, sbatch_call


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
    # These are written into the job script (test_script.py).
    in_the_script = ("max_stalls", "interface", "setup", "copy_code")
    for field in dataclasses.fields(SlurmConfig):
        if field.name in in_the_script or field.name.startswith("container"):
            continue
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
        (SlurmConfig(max_stalls=-1), {}, "must be 0 or more"),
        (SlurmConfig(), {"run_dir": Path("/my runs/a")}, "has a space in it"),
        (SlurmConfig(container="a", container_runtime="docker"), {}, "choose one of apptainer, pyxis"),
        (SlurmConfig(container="a", copy_code=True), {}, "the container has its own code"),
        (SlurmConfig(container_mounts=["/a"]), {}, "needs slurm.container, the image"),
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


def fake_sbatch(monkeypatch: pytest.MonkeyPatch, directory: Path, body: str, queue: str = "exit 1") -> None:
    for name, lines in (("sbatch", body), ("squeue", queue)):
        program = directory / name
        program.write_text(f"#!/bin/sh\n{lines}\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}{os.pathsep}{os.environ['PATH']}")


def run_config(directory: Path, *settings: str) -> RunConfig:
    run = ["run.name=genome", f"run.root={directory / 'runs'}", "data.shards=s", "data.length=64"]
    return load([], [*run, "trainer.nodes=2", "trainer.devices=8", *settings])


def submitted(directory: Path, *settings: str, chain: int = 1) -> list[int]:
    """Submit a run; returns the ids of its jobs."""
    config = run_config(directory, *settings)
    return submit.submit(config, call_for(config, directory)[0], directory, chain)


@pytest.mark.parametrize("answer", ["123", "123;cluster2", "Welcome to the machine\\n\\n123"])
def test_the_job_id_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, answer: str) -> None:
    fake_sbatch(monkeypatch, tmp_path, f"printf '{answer}\\n'")
    assert submitted(tmp_path) == [123]
    assert read_jobs(tmp_path / "runs" / "genome") == [123]


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
def test_a_refusal_is_one_line_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, body: str, message: str
) -> None:
    fake_sbatch(monkeypatch, tmp_path, body)
    with pytest.raises(UserError, match=message) as error:
        submitted(tmp_path)
    assert "\n" not in str(error.value)
    if "nonsense" not in body:  # then the job may run, and write its log
        assert sorted(path.name for path in tmp_path.iterdir()) == ["sbatch", "squeue"]


def test_a_refusal_leaves_a_run_that_was_there_as_it_was(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake_sbatch(monkeypatch, tmp_path, "exit 1")
    run = tmp_path / "runs" / "genome"
    run.mkdir(parents=True)
    (run / "submit.sbatch").write_text("before")
    with pytest.raises(UserError):
        submitted(tmp_path)
    assert [path.name for path in run.iterdir()] == ["submit.sbatch"]
    assert (run / "submit.sbatch").read_text() == "before"


def test_a_refusal_leaves_the_code_with_which_an_earlier_job_trained(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake_sbatch(monkeypatch, tmp_path, "exit 1")
    run = tmp_path / "runs" / "genome"
    with pytest.raises(UserError):
        submitted(tmp_path, "slurm.copy_code=true")
    assert not run.exists()
    (run / "code").mkdir(parents=True)
    (run / "code" / "before").touch()
    with pytest.raises(UserError):
        submitted(tmp_path, "slurm.copy_code=true")
    assert [path.name for path in run.rglob("*")] == ["code", "before"]


# sbatch counts from 12 and notes its options; the others note their arguments.
CHAIN = """\
n=$(cat {0}/n 2>/dev/null || echo 12); echo $((n + 1)) > {0}/n
for word; do case $word in --hold|--dependency*|--no-requeue) echo "$word" >> {0}/calls ;; esac; done
[ $n = {1} ] && {{ echo 'too many jobs' >&2; exit 1; }}
echo $n"""


def test_the_jobs_of_a_chain_wait_for_each_other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_sbatch(monkeypatch, tmp_path, CHAIN.format(tmp_path, "none"))
    for name in ("scontrol", "scancel"):
        (tmp_path / name).write_text(f'#!/bin/sh\necho {name} "$@" >> {tmp_path}/calls\n')
        (tmp_path / name).chmod(0o755)
    run = tmp_path / "runs" / "genome"
    # An option of the user that a chain overrides stays in front of the chain's own.
    more = 'slurm.extra=["--requeue"]'
    assert submitted(tmp_path, more, chain=3) == read_jobs(run) == [12, 13, 14]
    assert (tmp_path / "calls").read_text().split("\n")[:-1] == [
        *("--no-requeue", "--hold", "--no-requeue", "--dependency=afterany:12"),
        *("--no-requeue", "--dependency=afterany:13", "scontrol release 12"),
    ]
    assert f"CHAIN={run}/job.json" in (run / "submit.sbatch").read_text().splitlines()


def test_a_chain_of_arrays_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_sbatch(monkeypatch, tmp_path, "echo 1")
    with pytest.raises(UserError, match="has an array, whose elements"):
        submitted(tmp_path, 'slurm.extra=["--array=0-3"]', chain=2)
    assert not (tmp_path / "runs").exists()


def test_a_chain_of_which_a_job_is_refused_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fake_sbatch(monkeypatch, tmp_path, CHAIN.format(tmp_path, 14))
    (tmp_path / "scancel").write_text(f'#!/bin/sh\necho scancel "$@" >> {tmp_path}/calls\n')
    (tmp_path / "scancel").chmod(0o755)
    with pytest.raises(UserError, match="sbatch refuses: too many jobs"):
        submitted(tmp_path, chain=4)
    assert (tmp_path / "calls").read_text().split("\n")[-2] == "scancel 12 13"
    assert not (tmp_path / "runs").exists()
    # The controller answers neither sbatch nor scancel.
    (tmp_path / "n").unlink()
    (tmp_path / "scancel").write_text("#!/bin/sh\nexit 1\n")
    with pytest.raises(UserError, match="sbatch refuses: too many jobs"):
        submitted(tmp_path, chain=4)
    assert "cancel the jobs of this chain by hand: scancel 12 13" in caplog.text


def test_without_sbatch_the_message_says_where_to_submit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(UserError, match="not on PATH"):
        submitted(tmp_path)


def test_a_run_that_waits_or_runs_is_not_submitted_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    queue = f'case "$*" in *--jobs=7*) cat {tmp_path}/state ;; *) exit 1 ;; esac'
    fake_sbatch(monkeypatch, tmp_path, "echo 7", queue)
    (tmp_path / "state").write_text("7|7|PENDING|Priority||N/A|genome|/runs/genome/submit.sbatch x\n")
    assert submitted(tmp_path) == [7]
    before = (tmp_path / "runs" / "genome" / "submit.yaml").read_text()
    with pytest.raises(UserError, match=r"job 7 of this run is PENDING already: .* `megabase cancel "):
        submitted(tmp_path, "optim.lr=0.5")
    assert (tmp_path / "runs" / "genome" / "submit.yaml").read_text() == before
    (tmp_path / "state").write_text("7|7|TIMEOUT|None|n1|9|genome|/runs/genome/submit.sbatch x\n")
    assert submitted(tmp_path, "optim.lr=0.5") == [7]


def test_the_run_directory_keeps_what_was_submitted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_sbatch(monkeypatch, tmp_path, rf"cp \ {tmp_path}/taken 2>/dev/null; echo 1")
    config = run_config(tmp_path, "optim.lr=0.25", "slurm.max_stalls=5")
    words, _ = call_for(config, tmp_path)
    submit.submit(config, words, tmp_path)
    run = tmp_path / "runs" / "genome"
    assert (run / "logs").is_dir()
    assert load([run / "submit.yaml"]) == config
    script = (run / "submit.sbatch").read_text()
    assert shlex.split(script.splitlines()[1].removeprefix("# ")) == words
    assert "MAX_STALLS=5" in script.splitlines()


def test_the_job_gets_this_megabase_and_no_other_jobs_variables(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake_sbatch(monkeypatch, tmp_path, f"env > {tmp_path}/env; echo 1")
    monkeypatch.setenv("SLURM_NTASKS", "7")
    monkeypatch.setenv("SRUN_CPUS_PER_TASK", "7")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    submitted(tmp_path)
    seen = dict(line.split("=", 1) for line in (tmp_path / "env").read_text().splitlines() if "=" in line)
    assert "SLURM_NTASKS" not in seen and "SRUN_CPUS_PER_TASK" not in seen
    assert seen["SLURM_CONF"] == "/etc/slurm.conf"
    assert seen["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)


# -- from a config


def test_a_config_becomes_a_call_of_the_run_s_own_script_and_settings(tmp_path: Path) -> None:
    words, ranks = call_for(run_config(tmp_path), tmp_path)
    assert words[:2] == ["sbatch", "--parsable"]
    assert {"--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=8", f"--chdir={tmp_path}"} <= set(words)
    run = tmp_path / "runs" / "genome"
    assert words[-2:] == [f"{run}/submit.sbatch", f"{run}/submit.yaml"]
    assert ranks == 16


def test_gpus_null_requests_none(tmp_path: Path) -> None:
    config = run_config(tmp_path, "slurm.gpus=null")
    assert not [word for word in call_for(config, tmp_path)[0] if word.startswith("--gpu")]


def test_the_number_of_ranks_on_a_node_is_required(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"trainer\.devices is not set"):
        call_for(run_config(tmp_path, "trainer.devices=null"), tmp_path)


def test_a_login_node_without_gpus_decides_as_the_nodes_of_the_job(tmp_path: Path) -> None:
    def precision(*settings: str) -> str:
        return at_the_job(run_config(tmp_path, *settings)).trainer.precision

    assert precision() == "bf16" and precision("slurm.gpus=null") == "32"
    assert precision("trainer.precision=16") == "16"


def test_the_script_is_valid_bash() -> None:
    assert subprocess.run(["bash", "-n", str(TRAIN_SCRIPT)], capture_output=True, text=True).stderr == ""
