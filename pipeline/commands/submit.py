"""`megabase submit CONFIG... [KEY=VALUE...]`: check a training as `train` does, then submit it to SLURM."""

from __future__ import annotations

import argparse
import shlex

from megabase.pipeline.commands.settings import add_settings, split_settings

HELP = "train on a SLURM cluster"


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_settings(parser)
    parser.add_argument("--dry-run", action="store_true", help="show the sbatch call only")


def run(options: argparse.Namespace) -> int:
    """Run the command; returns the exit code. Nothing is submitted if the training could not run."""
    from megabase.pipeline.config.load import load
    from megabase.pipeline.rundir.paths import RunPaths
    from megabase.pipeline.slurm.submit import call_for, submit
    from megabase.pipeline.training.check import check

    files, overrides = split_settings(options.settings)
    config = load(files, overrides)
    call, ranks = call_for(config, files, overrides)
    check(config, ranks)
    if options.dry_run:
        print(shlex.join(call))
        return 0
    job = submit(call, config.directory)
    print(f"job {job} submitted; its log: {RunPaths(config.directory).slurm_log(job)}")
    return 0
