"""The job script of a run: `slurm/train.sbatch` with the sbatch call and the settings of `slurm.*` written into it.

A site's environment decides nothing in it: the program has its absolute path, and every setting is in the script, which
can be read, changed and submitted again by hand.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import megabase
from megabase.pipeline.config.schema import RunConfig
from megabase.pipeline.config.slurm import PYXIS
from megabase.pipeline.rundir.paths import RunPaths

TRAIN_SCRIPT = Path(__file__).resolve().parents[2] / "slurm" / "train.sbatch"
# In the script, the line that the settings replace.
MARK = "# === megabase submit: settings ===\n"


def job_script(config: RunConfig, call: Sequence[str], directory: Path, chain: bool = False) -> str:
    """The script that a job of a run executes.

    Args:
        config: of the run.
        call: of sbatch, for the comment at its top.
        directory: in which the job runs.
        chain: whether the job is one of a chain.
    """
    shebang, rest = TRAIN_SCRIPT.read_text().split("\n", 1)
    before, mark, after = rest.partition(MARK)
    assert mark, f"{TRAIN_SCRIPT} has no line {MARK!r}"
    return f"{shebang}\n# {shlex.join(call)}\n{before}{settings_of(config, directory, chain)}{after}"


def settings_of(config: RunConfig, directory: Path, chain: bool = False) -> str:
    """The lines of the script that hold the settings of a run."""
    slurm = config.slurm
    mounts = _mounts(config, directory)
    container: list[str] = []
    options: list[str] = []
    if slurm.container and slurm.container_runtime == PYXIS:
        pairs = ",".join(f"{mount}:{mount}" for mount in mounts)
        workdir = f"--container-workdir={directory}"
        options = [f"--container-image={slurm.container}", f"--container-mounts={pairs}", workdir]
    elif slurm.container:
        gpus = ["--nv"] if slurm.gpus else []
        binds = [word for mount in mounts for word in ("--bind", mount)]
        container = ["apptainer", "exec", *gpus, *binds, "--pwd", str(directory), slurm.container]
    lines = [
        "# Written by megabase submit:",
        f"MEGABASE=({shlex.join(program(config))})",
        f"MAX_STALLS={slurm.max_stalls}",
        f"INTERFACE={shlex.quote(slurm.interface or '')}",
        f"CONTAINER=({shlex.join(container)})",
        f"SRUN_OPTIONS=({shlex.join(options)})",
        *([f"CHAIN={shlex.quote(str(RunPaths(config.directory).job))}"] if chain else []),
        *slurm.setup,
    ]
    return "".join(f"{line}\n" for line in lines)


def program(config: RunConfig) -> list[str]:
    """The command that starts megabase in a job: that of this installation, of the copy, or of the container."""
    if config.slurm.container:
        return ["megabase"]
    run_module = [sys.executable, "-P", "-m", "megabase.pipeline.cli"]
    if config.slurm.copy_code:
        return ["env", f"PYTHONPATH={RunPaths(config.directory).code}", *run_module]
    installed = Path(sys.executable).with_name("megabase")
    return [str(installed)] if os.access(installed, os.X_OK) else run_module


def copy_code(target: Path) -> None:
    """Copy the code of megabase, without its tests, to the directory `target`, in place of what is there.

    That is kept beside it until `restore_code` or `forget_code`. If the copy fails, nothing has changed.
    """
    partial, before = _beside(target, "partial"), _beside(target, "before")
    shutil.rmtree(partial, ignore_errors=True)
    package = Path(megabase.__file__).parent
    shutil.copytree(package, partial / "megabase", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.rmtree(before, ignore_errors=True)
    with suppress(FileNotFoundError):
        target.rename(before)
    partial.rename(target)


def restore_code(target: Path) -> None:
    """Undo `copy_code`."""
    shutil.rmtree(target, ignore_errors=True)
    with suppress(FileNotFoundError):
        _beside(target, "before").rename(target)


def forget_code(target: Path) -> None:
    """Remove what `copy_code` replaced."""
    shutil.rmtree(_beside(target, "before"), ignore_errors=True)


def _beside(target: Path, suffix: str) -> Path:
    return target.with_name(f"{target.name}.{suffix}")


def _mounts(config: RunConfig, directory: Path) -> list[str]:
    """The directories that training reads and writes, without those that lie in another one."""
    shards = [] if "://" in config.data.shards else [Path(config.data.shards).absolute()]
    more = [config.run.init_from, config.zero.nvme_path, *config.slurm.container_mounts]
    needed = [directory, config.directory.parent, *shards, *(Path(path).absolute() for path in more if path)]
    found: list[Path] = []
    for path in sorted(set(needed)):
        if not any(path.is_relative_to(other) for other in found):
            found.append(path)
    return [str(path) for path in found]
