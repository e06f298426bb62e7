"""Which node failed in a start of a job, from the messages of srun and the files of the ranks.

A node is named only where it is clear that the fault is its own:

- SLURM lost it.
- All ranks but those of this node wrote heartbeats until the end: its ranks, or its file system, had stopped.
- A signal that no program sends to itself on purpose (SIGKILL, SIGBUS, ...) ended a task of it first.
- Only ranks of this node failed with an unexpected error; the others lost the connection to them.

Ranks that run into the same error, or exit with a code at the same time, name none.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from megabase.pipeline.files import read_object
from megabase.pipeline.ranks.watchdog import HEARTBEAT_S
from megabase.pipeline.rundir.status import RANK_FAILURES

# In the directory of a start: what srun printed.
SRUN_LOG = "srun.log"
# A rank whose heartbeat is this many seconds older than the newest one had stopped.
FROZEN_S = 3 * HEARTBEAT_S

_LOST = re.compile(r"^srun: error: Node failure on ([\w.,-]+)$", re.MULTILINE)
_EXIT = re.compile(r"^srun: error: ([\w.-]+): tasks? [\d,-]+: (.+)$", re.MULTILINE)
# How srun names signals. Not "Terminated", which it sends itself, nor "Out Of Memory": the job's own limit.
_SIGNALS = ("Killed", "Bus error", "Segmentation fault", "Aborted", "Illegal instruction")


@dataclass(frozen=True)
class Heartbeat:
    """The last sign of life of a rank: its node, and the Unix time at which it was written."""

    node: str
    written: float


def failed_nodes(messages: str, heartbeats: Iterable[Heartbeat], errors: Iterable[str]) -> frozenset[str]:
    """The nodes that failed in a start.

    Args:
        messages: that srun printed.
        heartbeats: of the ranks in this start.
        errors: nodes of the ranks that failed with an unexpected error.
    """
    if found := lost_nodes(messages) | _frozen(list(heartbeats)):
        return found
    # Only the first end: srun then ends the other tasks.
    if (first := _EXIT.search(messages)) and first[2].startswith(_SIGNALS):
        return frozenset({first[1]})
    alone = frozenset(errors)
    return alone if len(alone) == 1 else frozenset()


def lost_nodes(messages: str) -> frozenset[str]:
    """The nodes that SLURM lost, as srun printed."""
    return frozenset(node for match in _LOST.finditer(messages) for node in match[1].split(","))


def _frozen(heartbeats: list[Heartbeat]) -> frozenset[str]:
    """The nodes of ranks that stopped writing heartbeats before the others."""
    newest = max((each.written for each in heartbeats), default=0.0)
    return frozenset(each.node for each in heartbeats if newest - each.written > FROZEN_S)


def read_failed_nodes(start: Path, run: Path | None, since: float, lost_only: bool) -> frozenset[str]:
    """`failed_nodes` from the files of a start.

    Args:
        start: its directory.
        run: the run directory, if it is known.
        since: Unix time at which the start began; heartbeats from before are of another start.
        lost_only: SLURM ended the tasks, so only the nodes that it lost have failed.
    """
    try:
        messages = (start / SRUN_LOG).read_text(errors="replace")
    except OSError:
        messages = ""
    if lost_only:
        return lost_nodes(messages)
    found = [read_object(path) for path in sorted((run / "logs").glob("rank-*.heartbeat"))] if run else []
    heartbeats = [
        Heartbeat(str(each["host"]), each["written"])
        for each in found
        if isinstance(each.get("written"), float | int) and "host" in each and each["written"] >= since
    ]
    errors = [read_object(path).get("node") for path in start.glob(RANK_FAILURES.format(rank="*"))]
    return failed_nodes(messages, heartbeats, [str(node) for node in errors if node])
