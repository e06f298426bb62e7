"""A config becomes an sbatch call: `megabase submit`.

`sbatch_call` is a pure function; `submit` runs what it returns. The job itself, how it stops and how it goes
on, is `slurm/train.sbatch`.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from megabase.pipeline.config.schema import RunConfig, SlurmConfig
from megabase.pipeline.errors import UserError
from megabase.pipeline.rundir.paths import RunPaths

TRAIN_SCRIPT = Path(__file__).resolve().parents[2] / "slurm" / "train.sbatch"


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
        name: the job's name. gpus_per_node: 0 asks for none.
        run_dir: the job's log is `logs/slurm-JOBID.out` in it, one file for all its starts.
        directory: where the job runs; relative paths in its arguments and configs count from here.

    Raises:
        UserError: a setting that sbatch, or training under it, cannot use.
    """
    if name in ("bash", "interactive"):
        raise UserError(f"run.name={name}: Lightning takes a job of this name for a terminal; choose another")
    if not 0 < slurm.signal_seconds <= 65535:
        raise UserError(f"slurm.signal_seconds={slurm.signal_seconds}: SLURM takes 1 to 65535 seconds")
    limit = None if slurm.time is None else _seconds(slurm.time)
    if limit is not None and limit <= slurm.signal_seconds:
        raise UserError(
            f"slurm.time={slurm.time} is {limit} s, and training is told to stop slurm.signal_seconds="
            f"{slurm.signal_seconds} before its end: it would never train; raise slurm.time"
        )
    for option in slurm.extra:
        if not option.startswith("-"):
            raise UserError(
                f"slurm.extra has {option!r}: write an option and its value as one, --option=value"
            )
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
        # %j is the job's id; a % in the run's own path is written twice.
        "output": f"{str(run_dir).replace('%', '%%')}/logs/slurm-%j.out",
    }
    given = [f"--{option}={value}" for option, value in options.items() if value is not None]
    return ["sbatch", "--parsable", *given, *slurm.extra, str(script), *arguments]


def submit(call: Sequence[str], run_dir: Path) -> int:
    """Run an sbatch call; returns the job's id. `run_dir` gets submit.sbatch: the script and the call.

    Raises:
        UserError: there is no sbatch, or it refuses; the message is sbatch's own.
    """
    script = Path(next(word for word in call[1:] if not word.startswith("-")))
    shebang, rest = script.read_text().split("\n", 1)
    paths = RunPaths(run_dir)
    paths.logs.mkdir(parents=True, exist_ok=True)
    paths.submit_script.write_text(f"{shebang}\n# {shlex.join(call)}\n{rest}")
    # Of a job that we may be in ourselves nothing must leak into the new one; and the new one has to find the
    # `megabase` that submitted it, whether its environment is activated or not.
    environment = {
        k: v for k, v in os.environ.items() if k == "SLURM_CONF" or not k.startswith(("SLURM_", "SRUN_"))
    }
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    try:
        done = subprocess.run(call, env=environment, capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError("sbatch is not on PATH: submit from a login node of the SLURM cluster") from None
    # Some sites' sbatch greets first; the last line is JOBID or JOBID;CLUSTER.
    job = re.search(r"^(\d+)(;.*)?\s*\Z", done.stdout, re.MULTILINE)
    said = " ".join((done.stderr or done.stdout).split())
    if done.returncode:
        hint = "; for a cluster without GPUs set slurm.gpus=null" if "gres" in said.lower() else ""
        raise UserError(f"sbatch refuses: {said or f'exit code {done.returncode}'}{hint}")
    if not job:
        raise UserError(
            f"sbatch names no job id, so it is not known whether it took the job; it says: {said}"
        )
    return int(job[1])


def submit_run(
    config: RunConfig, files: Sequence[str], overrides: Sequence[str], *, dry_run: bool = False
) -> int:
    """`megabase submit`: submit the training of `config`, which `files` and `overrides` made.

    Returns:
        The exit code.

    Raises:
        UserError, DataError, ConfigError: the run could not train, or sbatch refuses; nothing is submitted.
    """
    from megabase.pipeline.training.run import check

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
    check(config, nodes * devices)
    if dry_run:
        print(shlex.join(call))
        return 0
    job = submit(call, config.directory)
    print(f"job {job} submitted; its log: {RunPaths(config.directory).slurm_log(job)}")
    return 0


def _seconds(time: str) -> int:
    """A time limit in seconds. Unquoted, YAML reads 24:00:00 as a number: that of its seconds, 86400."""
    match = re.fullmatch(r"(?:(?:(\d+)-)?(\d+):([0-5]\d):)?(\d+)", time)
    if not match or (match[2] and int(match[4]) > 59):
        raise UserError(f"slurm.time={time!r}: write HH:MM:SS or D-HH:MM:SS")
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds
