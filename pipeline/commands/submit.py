"""`megabase submit CONFIG... [KEY=VALUE...]`: check a training as `train` does, then submit it to SLURM."""

from __future__ import annotations

import argparse
import logging
import shlex
from pathlib import Path

from megabase.pipeline.commands.settings import add_settings, split_settings

logger = logging.getLogger(__name__)

HELP = "train on a SLURM cluster"


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_settings(parser)
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="show the sbatch call and the job script's settings; submit nothing",
    )
    parser.add_argument(
        "--chain",
        type=int,
        default=1,
        metavar="N",
        help="submit N jobs, each of which continues the one before: for clusters that do not requeue jobs",
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="submit a run that does not fit by `megabase plan`",
    )


def run(options: argparse.Namespace) -> int:
    """Run the command; returns the exit code. Nothing is submitted if the training could not run."""
    from megabase.pipeline.config.load import load
    from megabase.pipeline.errors import UserError
    from megabase.pipeline.rundir.paths import RunPaths
    from megabase.pipeline.slurm.script import settings_of
    from megabase.pipeline.slurm.submit import at_the_job, call_for, submit
    from megabase.pipeline.training.submission import check_submission

    if options.chain < 1:
        raise UserError(f"--chain={options.chain}: must be 1 or more")
    files, overrides = split_settings(options.settings)
    config = load(files, overrides)
    call, ranks = call_for(config, Path.cwd())
    found = check_submission(at_the_job(config), call, ranks)
    for each in found:
        if each.fatal and not options.force:
            raise UserError(each.text)
    if options.dry_run:
        print("\n".join(calls_of(call, RunPaths(config.directory).submit_script, options.chain)))
        print(f"\n{settings_of(config, Path.cwd(), options.chain > 1)}\nChecked:")
        print("\n".join(f"{each.what + ':':15}{each.text}" for each in found))
        return 0
    for each in found:
        if each.warning:
            logger.warning("%s: %s", each.what, each.text)
    jobs = submit(config, call, Path.cwd(), options.chain)
    log = RunPaths(config.directory).slurm_log(jobs[0])
    if len(jobs) == 1:
        print(f"job {jobs[0]} submitted; its log: {log}")
    else:
        ids = ", ".join(map(str, jobs))
        print(f"jobs {ids} submitted, each continues the one before; the log of the first: {log}")
    return 0


def calls_of(call: list[str], script: Path, chain: int) -> list[str]:
    """The commands that submit a chain of jobs, or a single one, as lines for a shell."""
    from megabase.pipeline.slurm.submit import in_chain

    if chain == 1:
        return [shlex.join(call)]
    first = shlex.join(in_chain(call, script, None))
    more = [shlex.join(in_chain(call, script, f"JOB{number}")) for number in range(1, chain)]
    return [first, *more, "scontrol release JOB1"]
