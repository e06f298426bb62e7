"""Finds processes of a test cluster by what /proc says of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path


def processes(check: Callable[[Path], bool]) -> Iterator[int]:
    """Process ids of the processes for whose directory in /proc `check` holds."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            if check(process):
                yield int(process.name)


def is_on(node: str, config: Path) -> Callable[[Path], bool]:
    """Whether a process, given as its directory in /proc, is a daemon of a node or belongs to a job on it."""
    variables = {f"SLURMD_NODENAME={node}".encode(), f"SLURM_CONF={config}".encode()}
    log = config.with_name(f"slurmd-{node}.log")

    def check(process: Path) -> bool:
        if variables.issubset((process / "environ").read_bytes().split(b"\0")):
            return True
        # slurmd and slurmstepd have no such environment, but the node's log.
        return any(file.readlink() == log for file in (process / "fd").iterdir())

    return check
