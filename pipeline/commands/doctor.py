"""`megabase doctor [CONFIG...] [KEY=VALUE...]`: what is wrong with this machine, or with a cluster login."""

from __future__ import annotations

import argparse

from megabase.pipeline.commands.settings import split_settings

HELP = "what is wrong with this machine or cluster login, and what to do"
DESCRIPTION = (
    "Check packages, GPUs, attention kernels, communication between ranks, the disk of the runs, clocks, SLURM, MLflow"
    " and shards. Each line that is wrong says what to do; the exit code is 1 if there is one. With the files and"
    " settings of a run, its run.root, tracking.*, slurm.partition, zero.nvme_path and data.shards are checked."
)


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.description = DESCRIPTION
    parser.add_argument(
        "settings", nargs="*", metavar="CONFIG | KEY=VALUE", help="YAML files, then settings (default: none)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    from megabase.pipeline.config.load import load
    from megabase.pipeline.doctor.run import doctor

    required = {"run": {"name": "doctor"}, "data": {"shards": ""}}
    return doctor(load(*split_settings(options.settings), required), as_json=options.json)
