"""`megabase job-end`: whether a SLURM job starts again. `slurm/train.sbatch` calls it when training has ended."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

HELP = "used by slurm/train.sbatch: whether a job starts again"

logger = logging.getLogger(__name__)


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.description = "Print `again`, or the exit code with which the job ends; why is printed on stderr."
    parser.add_argument("--code", type=int, required=True, help="exit code of srun")
    parser.add_argument("--status", type=Path, required=True, metavar="FILE", help="what this start wrote")
    parser.add_argument("--record", type=Path, required=True, metavar="FILE", help="kept between starts")
    parser.add_argument("--job-state", default="RUNNING", help="JobState of scontrol")
    parser.add_argument("--reason", default="None", help="Reason of scontrol")
    parser.add_argument("--max-stalls", type=int, default=3, metavar="N", help="see slurm.max_stalls")


def run(options: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    from megabase.pipeline.slurm.job_end import judge

    verdict = judge(
        options.status, options.record, options.code, options.job_state, options.reason, options.max_stalls
    )
    if verdict.text:
        logger.info(verdict.text)
    print("again" if verdict.again else verdict.code)
    return 0
