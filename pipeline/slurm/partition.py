"""Whether a partition of the cluster takes a job, asked before the job is queued.

Many clusters queue a job that asks for more than its partition ever gives, and never start it.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from megabase.pipeline.errors import UserError

TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Partition:
    """A partition.

    Attributes:
        name: of it.
        default: it takes jobs that name none.
        up: it starts jobs now.
        limit: longest time limit in seconds; None: there is none.
        nodes: that it has.
    """

    name: str
    default: bool
    up: bool
    limit: int | None
    nodes: int


def partitions() -> list[Partition]:
    """The partitions of this cluster; empty if SLURM does not answer within TIMEOUT_S seconds."""
    command = ["sinfo", "--all", "--noheader", "--format=%P|%a|%l|%D"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return parse(done.stdout) if done.returncode == 0 else []


def parse(printed: str) -> list[Partition]:
    """Read what `sinfo` printed in the format of `partitions`. Lines in another format are left out."""
    found: dict[str, Partition] = {}
    for line in printed.splitlines():
        match = re.fullmatch(r"([^|*]+)(\*?)\|(\w+)\|([^|]+)\|(\d+)", line.strip())
        if not match:
            continue
        name, star, state, limit, nodes = match.groups()
        before = found[name].nodes if name in found else 0
        found[name] = Partition(name, bool(star), state == "up", _seconds(limit), before + int(nodes))
    return list(found.values())


def check_partition(call: Sequence[str], found: Sequence[Partition]) -> str:
    """Check an sbatch call against the partitions of the cluster.

    Args:
        call: of `sbatch_call`.
        found: all partitions; empty: unknown.

    Returns:
        What was checked, in one line.

    Raises:
        UserError: the partition does not exist, or will never start the job.
    """
    if not found:
        return "not checked: sinfo does not answer"
    if _option(call, "clusters"):
        return "not checked: the job is for another cluster"
    names = ", ".join(each.name for each in found)
    wanted = _option(call, "partition")
    if wanted is None:
        chosen = [each for each in found if each.default]
        if not chosen:
            raise UserError(
                f"slurm.partition is not set, and the cluster has no default: choose one of {names}"
            )
    else:
        by_name = {each.name: each for each in found}
        if missing := [name for name in wanted.split(",") if name not in by_name]:
            raise UserError(
                f"slurm.partition={wanted}: the cluster has no partition {missing[0]}: choose one of {names}"
            )
        chosen = [by_name[name] for name in wanted.split(",")]
    problems = [_problem(call, each) for each in chosen]
    if None not in problems:  # SLURM starts the job in any partition that can
        raise UserError(str(problems[0]))
    taken = chosen[problems.index(None)]
    down = "" if taken.up else "; it is not up now: the job waits until it is"
    limit = "no time limit" if taken.limit is None else f"time limit {as_limit(taken.limit)}"
    return f"{taken.name}: {taken.nodes} node{'s' * (taken.nodes != 1)}, {limit}{down}"


def _problem(call: Sequence[str], partition: Partition) -> str | None:
    """Why a partition will never start a job, with the way out; None if it may."""
    nodes, time = _option(call, "nodes"), _option(call, "time")
    if nodes and nodes.isdigit() and int(nodes) > partition.nodes:
        return (
            f"trainer.nodes={nodes}: partition {partition.name} has {partition.nodes}: take fewer, or another"
            " slurm.partition"
        )
    seconds = _seconds(time) if time else None
    # A quality of service may allow more time than the partition.
    if seconds and partition.limit is not None and seconds > partition.limit and not _option(call, "qos"):
        return (
            f"slurm.time={time}: partition {partition.name} allows {as_limit(partition.limit)}: lower slurm.time. The"
            " job starts again at its time limit, so it need not cover the whole training"
        )
    return None


def _option(call: Sequence[str], name: str) -> str | None:
    """The value of an option of an sbatch call, as sbatch takes it: of several, the last."""
    values = [word.partition("=")[2] for word in call if word.startswith(f"--{name}=")]
    return values[-1] if values else None


def _seconds(limit: str) -> int | None:
    """A time limit as SLURM writes it: [D-]HH:MM:SS or MM:SS; None for any other word, such as infinite."""
    match = re.fullmatch(r"(?:(?:(\d+)-)?(\d+):)?(\d+):(\d+)", limit)
    if not match:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def as_limit(seconds: int) -> str:
    """A time limit as SLURM takes and shows it, HH:MM:SS."""
    return f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}"
