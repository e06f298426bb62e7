"""`megabase job-end`: whether a SLURM job starts again. `slurm/train.sbatch` calls it when training has ended."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

HELP = "used by slurm/train.sbatch: whether a job starts again"

logger = logging.getLogger(__name__)


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.description = (
        "Print three words: `again` (requeue the job), `next` (the next job of the chain continues, or SLURM restarts"
        " the job itself) or `end`; the exit code of the job; nodes to exclude, with commas, or `-`. Why is on stderr."
    )
    parser.add_argument("--code", type=int, required=True, help="exit code of srun")
    parser.add_argument("--status", type=Path, required=True, metavar="FILE", help="what this start wrote")
    parser.add_argument("--record", type=Path, required=True, metavar="FILE", help="kept between starts")
    parser.add_argument("--log", type=Path, default=Path(), metavar="FILE", help="of the job")
    parser.add_argument("--job", default="", help="id of the job")
    parser.add_argument("--seconds", type=float, default=0.0, help="since this start began")
    parser.add_argument("--job-state", default="RUNNING", help="JobState of scontrol")
    parser.add_argument("--reason", default="None", help="Reason of scontrol")
    parser.add_argument("--max-stalls", type=int, default=3, metavar="N", help="see slurm.max_stalls")
    parser.add_argument("--successors", metavar="IDS", help="jobs that follow in a chain; may be empty")
    parser.add_argument("--needed", type=int, default=1, metavar="N", help="nodes of the job")
    for name, what in (
        ("usable", "of the partition that work"),
        ("excluded", "that the job must not have"),
        ("required", "that the job must have"),
    ):
        parser.add_argument(f"--{name}", default="", metavar="NODES", help=f"nodes {what}")


def run(options: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    from megabase.pipeline.files import read_object
    from megabase.pipeline.slurm.job_end import END, Ended, Files, Place, judge
    from megabase.pipeline.slurm.last_status import report_end

    successors = None if options.successors is None else [int(job) for job in options.successors.split()]
    nodes = {name: frozenset(getattr(options, name).split()) for name in ("usable", "excluded", "required")}
    checkpoints = read_object(options.record).get("checkpoints", "")  # `judge` removes the record
    verdict = judge(
        Files(options.status, options.record, options.log),
        Ended(options.code, job_state=options.job_state, reason=options.reason),
        options.job,
        options.seconds,
        options.max_stalls,
        Place(successors, options.needed, **nodes),
    )
    if verdict.text:
        logger.info(verdict.text)
    print(verdict.what, verdict.code, ",".join(verdict.exclude) or "-", flush=True)
    if verdict.what == END:
        report_end(options.status, checkpoints, options.job_state, options.reason)
    return 0
