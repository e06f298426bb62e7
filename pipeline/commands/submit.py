"""`megabase submit CONFIG... [KEY=VALUE...]`: check a training as `train` does, then submit it to SLURM."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from megabase.pipeline.commands.settings import add_settings, split_settings

HELP = "train on a SLURM cluster"


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_settings(parser)
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="show the sbatch call and the job script's settings; submit nothing",
    )


def run(options: argparse.Namespace) -> int:
    """Run the command; returns the exit code. Nothing is submitted if the training could not run."""
    from megabase.pipeline.config.load import load
    from megabase.pipeline.rundir.paths import RunPaths
    from megabase.pipeline.slurm.script import settings_of
    from megabase.pipeline.slurm.submit import at_the_job, call_for, submit
    from megabase.pipeline.training.check import check

    files, overrides = split_settings(options.settings)
    config = load(files, overrides)
    call, ranks = call_for(config, Path.cwd())
    check(at_the_job(config), ranks, here=False)
    if options.dry_run:
        print(f"{shlex.join(call)}\n\n{settings_of(config, Path.cwd())}", end="")
        return 0
    job = submit(config, call, Path.cwd())
    print(f"job {job} submitted; its log: {RunPaths(config.directory).slurm_log(job)}")
    return 0
