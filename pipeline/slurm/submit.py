"""From a config to an sbatch call, and its submission.

`call_for` and `sbatch_call` are pure; `submit` runs the call that they return. `slurm/train.sbatch` describes how the
job stops and continues.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from megabase.pipeline.config.schema import RunConfig
from megabase.pipeline.config.slurm import SlurmConfig
from megabase.pipeline.errors import UserError
from megabase.pipeline.rundir.paths import RunPaths

TRAIN_SCRIPT = Path(__file__).resolve().parents[2] / "slurm" / "train.sbatch"
# The longest time before the limit at which SLURM can send a signal, in seconds.
LONGEST_SIGNAL_S = 65535


def call_for(config: RunConfig, files: Sequence[str], overrides: Sequence[str]) -> tuple[list[str], int]:
    """The sbatch call of `megabase submit`, and the number of ranks that the job starts.

    Args:
        config: of the run, made of `files` and `overrides`.
        files: config files; the job gets their absolute paths.
        overrides: KEY=VALUE settings; the job gets them as they are.

    Raises:
        UserError: `trainer.devices` is not set, or sbatch cannot use a setting.
    """
    nodes, devices = config.trainer.nodes, config.trainer.devices
    if devices is None:
        raise UserError("trainer.devices is not set: a job has to ask for a number of ranks on each node")
    call = sbatch_call(
        config.slurm,
        name=config.run.name,
        nodes=nodes,
        tasks_per_node=devices,
        gpus_per_node=devices if config.slurm.gpus else 0,
        run_dir=config.directory,
        directory=Path.cwd(),
        script=TRAIN_SCRIPT,
        arguments=[*(str(Path(file).absolute()) for file in files), *overrides],
    )
    return call, nodes * devices


def sbatch_call(
    slurm: SlurmConfig,
    *,
    name: str,
    nodes: int,
    tasks_per_node: int,
    gpus_per_node: int,
    run_dir: Path,
    directory: Path,
    script: Path,
    arguments: Sequence[str],
) -> list[str]:
    """The command line that submits `script` with `arguments`, as a list of words.

    Args:
        slurm: further options of the job.
        name: of the job.
        nodes: that the job gets.
        tasks_per_node: ranks on each node.
        gpus_per_node: GPUs on each node; 0 requests none.
        run_dir: the job's log is `logs/slurm-JOBID.out` in it, one file for all starts of the job.
        directory: working directory of the job; relative paths in its arguments and configs start there.
        script: the job script.
        arguments: of the script.

    Raises:
        UserError: sbatch, or training in its job, cannot use a setting.
    """
    limit = _time_limit(slurm)
    _check_options(slurm, name)
    gpu_type = "" if slurm.gpus in (None, "any") else f"{slurm.gpus}:"
    options: dict[str, object] = {
        "job-name": name,
        "nodes": nodes,
        "ntasks-per-node": tasks_per_node,
        "gpus-per-node": f"{gpu_type}{gpus_per_node}" if gpus_per_node else None,
        "cpus-per-task": slurm.cpus_per_task,
        "mem": slurm.mem,
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "constraint": slurm.constraint,
        "time": None if limit is None else f"{limit // 3600:02}:{limit // 60 % 60:02}:{limit % 60:02}",
        "signal": f"USR1@{slurm.signal_seconds}",
        "chdir": directory,
        # sbatch replaces %j by the job's id; %% stands for a % in the path itself.
        "output": f"{str(run_dir).replace('%', '%%')}/logs/slurm-%j.out",
    }
    given = [f"--{option}={value}" for option, value in options.items() if value is not None]
    return ["sbatch", "--parsable", *given, *slurm.extra, str(script), *arguments]


def submit(call: Sequence[str], run_dir: Path) -> int:
    """Run an sbatch call and return the job's id. Writes `submit.sbatch`, the script and the call, to `run_dir`.

    Raises:
        UserError: there is no sbatch, or it refuses the job; the message has sbatch's own words. Directories that were
            made for the job are removed.
    """
    script = Path(next(word for word in call[1:] if not word.startswith("-")))
    shebang, rest = script.read_text().split("\n", 1)
    paths = RunPaths(run_dir)
    # The directory of the log must exist when the job starts.
    made = [path for path in (paths.logs, *paths.logs.parents) if not path.exists()]
    paths.logs.mkdir(parents=True, exist_ok=True)
    try:
        printed = _run_sbatch(call)
    except UserError:
        for path in made:
            with suppress(OSError):  # another process has written there
                path.rmdir()
        raise
    paths.submit_script.write_text(f"{shebang}\n# {shlex.join(call)}\n{rest}")
    # sbatch of some sites prints a greeting first. The last line is JOBID or JOBID;CLUSTER.
    job = re.search(r"^(\d+)(;.*)?\s*\Z", printed, re.MULTILINE)
    if not job:
        raise UserError(
            "sbatch printed no job id, so it is not known whether it took the job; it printed:"
            f" {' '.join(printed.split())}"
        )
    return int(job[1])


def _run_sbatch(call: Sequence[str]) -> str:
    """Run an sbatch call; returns what it printed. Raises UserError if there is no sbatch, or it refuses the job."""
    try:
        done = subprocess.run(call, env=_job_environment(), capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError("sbatch is not on PATH: submit from a login node of the SLURM cluster") from None
    answer = " ".join((done.stderr or done.stdout).split())
    if done.returncode:
        hint = "; for a cluster without GPUs set slurm.gpus=null" if "gres" in answer.lower() else ""
        raise UserError(f"sbatch refuses: {answer or f'exit code {done.returncode}'}{hint}")
    return done.stdout


def _check_options(slurm: SlurmConfig, name: str) -> None:
    if name in ("bash", "interactive"):
        raise UserError(
            f"run.name={name}: Lightning trains only one rank in a job of this name, as in a terminal; choose another"
        )
    for option in slurm.extra:
        if not option.startswith("-"):
            raise UserError(
                f"slurm.extra has {option!r}: write an option and its value as one, --option=value"
            )


def _time_limit(slurm: SlurmConfig) -> int | None:
    """`slurm.time` in seconds; None: the partition's limit. Checks that training has time before the stop signal."""
    if not 0 < slurm.signal_seconds <= LONGEST_SIGNAL_S:
        raise UserError(
            f"slurm.signal_seconds={slurm.signal_seconds}: SLURM takes 1 to {LONGEST_SIGNAL_S} seconds"
        )
    limit = None if slurm.time is None else _seconds(slurm.time)
    if limit is not None and limit <= slurm.signal_seconds:
        raise UserError(
            f"slurm.time={slurm.time} is {limit} s, and SLURM signals training to stop slurm.signal_seconds="
            f"{slurm.signal_seconds} before its end: it would never train; raise slurm.time"
        )
    return limit


def _job_environment() -> dict[str, str]:
    """The environment for sbatch, which the job inherits.

    If this process itself runs in a job, the variables of that job are left out. The directory of this interpreter is
    first on PATH, so that the job runs the `megabase` that submitted it even if its environment is not activated.
    """
    environment = {
        key: value
        for key, value in os.environ.items()
        if key == "SLURM_CONF" or not key.startswith(("SLURM_", "SRUN_"))
    }
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    return environment


def _seconds(time: str) -> int:
    """A time limit in seconds. YAML reads an unquoted 24:00:00 as 86400, so a bare number is one of seconds."""
    match = re.fullmatch(r"(?:(?:(\d+)-)?(\d+):([0-5]\d):)?(\d+)", time)
    if not match or (match[2] and int(match[4]) > 59):
        raise UserError(f"slurm.time={time!r}: write HH:MM:SS or D-HH:MM:SS")
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds
