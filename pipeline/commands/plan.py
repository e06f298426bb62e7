"""`megabase plan CONFIG... [KEY=VALUE...]`: whether a run fits, how long it takes, and what limits it, beforehand."""

from __future__ import annotations

import argparse
import json

from megabase.pipeline.commands.settings import add_settings, split_settings

HELP = "whether a run fits, how long it takes and what limits it, before it is queued"
DESCRIPTION = (
    "Compute, from the settings alone, the memory of a rank, the time of a step and of the run, and what fits. It needs"
    " no GPU, and of the shards only their index; if they do not exist yet, epochs are left out. The figures are"
    " estimates: docs/scale.md compares them with measurements. The exit code is 1 if the run does not fit."
)


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.description = DESCRIPTION
    add_settings(parser)
    parser.add_argument(
        "--hardware",
        metavar="NAME|FILE",
        help="a profile of configs/hardware (h100, h200, a100-80gb, a100-40gb, cpu) or a file like them. Default: what"
        " slurm.gpus names (null: cpu). With slurm.gpus=any: this machine's GPU; without one h100, if the run has"
        " several nodes, more ranks than this machine has CPUs, or is too slow for them, and cpu otherwise",
    )
    parser.add_argument(
        "--ranks",
        type=int,
        metavar="N",
        help="on all nodes together (default: trainer.nodes x trainer.devices)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON: bytes and seconds")


def run(options: argparse.Namespace) -> int:
    """Run the command; returns the exit code: 1 if the run does not fit."""
    from megabase.pipeline.config.load import load
    from megabase.pipeline.plan.request import NOT_SET, planned
    from megabase.pipeline.plan.table import as_json, as_table, limits_of
    from megabase.pipeline.plan.warnings import warnings_of
    from megabase.pipeline.tables import show

    required = {"run": {"name": "plan"}, "data": {"shards": NOT_SET}}
    config = load(*split_settings(options.settings), required)
    plan, notes = planned(config, options.hardware, options.ranks)
    warnings = warnings_of(plan)
    if options.json:
        print(json.dumps(as_json(plan, notes, warnings), indent=1))
    else:
        show(as_table(plan, *limits_of(plan)), *notes, *(f"Warning: {warning}." for warning in warnings))
    return 0 if plan.space.fits else 1
