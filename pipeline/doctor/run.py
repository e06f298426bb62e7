"""All checks in order, and the table of what they found."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from megabase.pipeline.config.schema import RunConfig
from megabase.pipeline.doctor.device import check_device, check_kernel, check_limits
from megabase.pipeline.doctor.disk import check_disk
from megabase.pipeline.doctor.finding import WRONG, Finding
from megabase.pipeline.doctor.network import check_ranks
from megabase.pipeline.doctor.packages import check_lock, check_packages
from megabase.pipeline.doctor.services import check_mlflow, check_shards, check_slurm, nvme_finding
from megabase.pipeline.hardware import Machine
from megabase.pipeline.readable import counted
from megabase.pipeline.tables import new_table, show


def doctor(config: RunConfig, *, as_json: bool = False) -> int:
    """Check this machine, print what was found; returns 1 if something is wrong, else 0.

    Args:
        config: whose run root, tracking server, partition, shards and disks are checked.
        as_json: print JSON in place of a table.
    """
    findings = list(check(config))
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=1))
    else:
        print_table(findings)
    return int(any(finding.state == WRONG for finding in findings))


def check(config: RunConfig) -> Iterator[Finding]:
    """Run all checks."""
    machine = Machine.this()
    yield check_packages()
    yield from check_lock()
    yield from check_device(machine)
    yield check_kernel(torch.device("cpu"))
    if machine.gpus:
        yield check_kernel(torch.device("cuda"))
    yield from check_limits()
    yield check_ranks("gloo")
    if machine.gpus:
        yield check_ranks("nccl", machine.gpus)
    yield from check_disk(Path(config.run.root).absolute())
    yield from nvme_finding(config)
    yield from check_slurm(config)
    yield from check_mlflow(config)
    yield from check_shards(config)


def print_table(findings: list[Finding]) -> None:
    """A line for each finding, and below it the way out."""
    table = new_table(("", "check", "found"), left=("", "check", "found"))
    for finding in findings:
        table.add_row(finding.state, finding.what, finding.text)
        if finding.way_out:
            table.add_row("", "", f"-> {finding.way_out}")
    wrongs = sum(finding.state == WRONG for finding in findings)
    last = f"{counted(wrongs, 'thing')} to mend" if wrongs else "nothing is wrong"
    show(table, last)
