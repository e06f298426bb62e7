"""From a config to an sbatch call, and its submission.

`call_for` and `sbatch_call` are pure; `submit` writes what the job needs and runs the call that they return.
`slurm/train.sbatch` describes how the job stops and continues.
"""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from megabase.datamodules.files import publish
from megabase.pipeline.config.load import save
from megabase.pipeline.config.schema import RunConfig
from megabase.pipeline.config.slurm import RUNTIMES, SlurmConfig, seconds_of_limit
from megabase.pipeline.errors import UserError
from megabase.pipeline.hardware import precision_of
from megabase.pipeline.rundir.paths import RunPaths
from megabase.pipeline.slurm.partition import as_limit
from megabase.pipeline.slurm.queue import refuse_second, write_jobs
from megabase.pipeline.slurm.script import copy_code, forget_code, job_script, restore_code

logger = logging.getLogger(__name__)

# The longest time before the limit at which SLURM can send a signal, in seconds.
LONGEST_SIGNAL_S = 65535


def call_for(config: RunConfig, directory: Path) -> tuple[list[str], int]:
    """The sbatch call of `megabase submit`, and the number of ranks that the job starts.

    Args:
        config: of the run.
        directory: in which the job runs.

    Raises:
        UserError: `trainer.devices` is not set, or sbatch cannot use a setting.
    """
    nodes, devices = config.trainer.nodes, config.trainer.devices
    if devices is None:
        raise UserError("trainer.devices is not set: a job has to ask for a number of ranks on each node")
    paths = RunPaths(config.directory)
    call = sbatch_call(
        config.slurm,
        name=config.run.name,
        nodes=nodes,
        tasks_per_node=devices,
        gpus_per_node=devices if config.slurm.gpus else 0,
        run_dir=config.directory,
        directory=directory,
        script=paths.submit_script,
        arguments=[str(paths.submit_config)],
    )
    return call, nodes * devices


def at_the_job(config: RunConfig) -> RunConfig:
    """The settings as they are where the job runs: it may have GPUs where this machine has none, or none."""
    precision = precision_of(config.trainer.precision, on_gpus=bool(config.slurm.gpus))
    return replace(config, trainer=replace(config.trainer, precision=precision))


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
    if re.search(r"\s", str(run_dir)):
        raise UserError(f"run.root: {run_dir} has a space in it, with which SLURM cannot tell where a log is")
    limit = _time_limit(slurm)
    _check_options(slurm, name)
    _check_job(slurm)
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
        "time": None if limit is None else as_limit(limit),
        "signal": f"USR1@{slurm.signal_seconds}",
        "chdir": directory,
        # sbatch replaces %j by the job's id; %% stands for a % in the path itself.
        "output": f"{str(run_dir).replace('%', '%%')}/logs/slurm-%j.out",
    }
    given = [f"--{option}={value}" for option, value in options.items() if value is not None]
    return ["sbatch", "--parsable", *given, *slurm.extra, str(script), *arguments]


def in_chain(call: Sequence[str], script: Path, after: int | str | None) -> list[str]:
    """The sbatch call of a job in a chain. The job is not requeued: the next one continues.

    Args:
        call: of `sbatch_call`, with `script`.
        script: the job script.
        after: the job that must end before; None: this is the first one, which waits for `scontrol release`, so that no
            job ends before those that follow it are in the queue.

    Raises:
        UserError: the job is an array.
    """
    if any(word.startswith(("--array", "-a")) for word in call):
        raise UserError(
            "--chain: slurm.extra has an array, whose elements do not end together: leave one of them out"
        )
    place = list(call).index(str(script))
    wait = "--hold" if after is None else f"--dependency=afterany:{after}"
    # After the options of `slurm.extra`, which they override.
    return [*call[:place], "--no-requeue", wait, *call[place:]]


def submit(config: RunConfig, call: Sequence[str], directory: Path, chain: int = 1) -> list[int]:
    """Write what the job needs into the run directory, run an sbatch call, and return the job's id.

    The run directory gets the script (`submit.sbatch`) and the settings (`submit.yaml`) that the job reads at each of
    its starts: later changes of config files do not reach it. If sbatch refuses, both are as they were before.

    Args:
        config: of the run.
        call: of `call_for`.
        directory: in which the job runs.
        chain: jobs to submit, of which each continues the one before. If sbatch refuses one, the others are cancelled.

    Returns:
        The ids of the jobs, in the order in which they run.

    Raises:
        UserError: a job of the run waits or runs, there is no sbatch, or it refuses a job; the message has sbatch's
            own words.
    """
    refuse_second(config.directory, config.run.name)
    paths = RunPaths(config.directory)
    before = {path: _content(path) for path in (paths.submit_script, paths.submit_config, paths.job)}
    made = [path for path in (paths.logs, *paths.logs.parents) if not path.exists()]
    jobs: list[int] = []
    copied = False
    try:
        _write_files(config, call, directory, chain > 1)
        copied = config.slurm.copy_code
        for _ in range(chain):
            after = jobs[-1] if jobs else None
            link = in_chain(call, paths.submit_script, after) if chain > 1 else call
            jobs.append(_job_id(_run(link)))
            write_jobs(config.directory, jobs)
        if chain > 1:
            _run(["scontrol", "release", str(jobs[0])])
    except BaseException as error:
        if jobs:
            _cancel(jobs)
        if not isinstance(error, NoJobIdError):
            if copied:
                restore_code(paths.code)
            _restore(before, made)
        raise
    if copied:
        forget_code(paths.code)
    return jobs


class NoJobIdError(UserError):
    """sbatch did not say which job it took, if any."""


def _job_id(printed: str) -> int:
    """The id in what sbatch printed. Some sites print a greeting first. The last line is JOBID or JOBID;CLUSTER."""
    job = re.search(r"^(\d+)(;.*)?\s*\Z", printed, re.MULTILINE)
    if not job:
        raise NoJobIdError(
            "sbatch printed no job id, so it is not known whether it took the job; it printed:"
            f" {' '.join(printed.split())}"
        )
    return int(job[1])


def _cancel(jobs: Sequence[int]) -> None:
    """Cancel the jobs of a chain that could not be submitted as a whole."""
    ids = [str(job) for job in jobs]
    try:
        _run(["scancel", *ids])
    except UserError as error:
        logger.error(f"{error}; cancel the jobs of this chain by hand: scancel {' '.join(ids)}")


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


def _restore(before: dict[Path, bytes | None], made: Sequence[Path]) -> None:
    """Give files their content from before (None: there was none), and remove directories that were made."""
    for path, content in before.items():
        if content is None:
            path.unlink(missing_ok=True)
        else:
            publish(path, content)
    for path in made:
        with suppress(OSError):  # another process has written there
            path.rmdir()


def _write_files(config: RunConfig, call: Sequence[str], directory: Path, chain: bool) -> None:
    """Write script, settings and, with `slurm.copy_code`, the code. Raises UserError if they cannot be written."""
    paths = RunPaths(config.directory)
    try:
        paths.logs.mkdir(parents=True, exist_ok=True)
        save(config, paths.submit_config)
        publish(paths.submit_script, job_script(config, call, directory, chain).encode())
        if config.slurm.copy_code:
            copy_code(paths.code)
    except OSError as error:
        raise UserError(f"{error.filename or config.directory} cannot be written: {error.strerror}") from None


def _run(call: Sequence[str]) -> str:
    """Run sbatch, or another program of SLURM; returns what it printed.

    Raises:
        UserError: there is no such program, or it refuses.
    """
    program = call[0]
    try:
        done = subprocess.run(call, env=_job_environment(), capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError(f"{program} is not on PATH: submit from a login node of the SLURM cluster") from None
    answer = " ".join((done.stderr or done.stdout).split())
    if done.returncode:
        hint = "; for a cluster without GPUs set slurm.gpus=null" if "gres" in answer.lower() else ""
        raise UserError(f"{program} refuses: {answer or f'exit code {done.returncode}'}{hint}")
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


def _check_job(slurm: SlurmConfig) -> None:
    """Check the settings that the job script uses."""
    if slurm.max_stalls < 0:
        raise UserError(f"slurm.max_stalls={slurm.max_stalls}: must be 0 or more")
    if slurm.container_runtime not in RUNTIMES:
        raise UserError(
            f"slurm.container_runtime={slurm.container_runtime!r}: choose one of {', '.join(RUNTIMES)}"
        )
    if slurm.container and slurm.copy_code:
        raise UserError(
            "slurm.copy_code=true with slurm.container: the container has its own code: set one of them"
        )
    if slurm.container_mounts and not slurm.container:
        raise UserError("slurm.container_mounts needs slurm.container, the image")


def _time_limit(slurm: SlurmConfig) -> int | None:
    """`slurm.time` in seconds; None: the partition's limit. Checks that training has time before the stop signal."""
    if not 0 < slurm.signal_seconds <= LONGEST_SIGNAL_S:
        raise UserError(
            f"slurm.signal_seconds={slurm.signal_seconds}: SLURM takes 1 to {LONGEST_SIGNAL_S} seconds"
        )
    limit = seconds_of_limit(slurm.time)
    if slurm.time is not None and limit is None:
        raise UserError(f"slurm.time={slurm.time!r}: write HH:MM:SS or D-HH:MM:SS")
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
