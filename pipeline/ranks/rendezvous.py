"""The rendezvous of the ranks: they connect to a TCP store and make torch's process group.

The group is made before Lightning's Trainer, so that ranks can agree on a checkpoint before anything is built.
"""

from __future__ import annotations

import logging
import os
import platform
from datetime import timedelta

import torch
import torch.distributed as dist

from megabase.pipeline.errors import RunError, first_line
from megabase.pipeline.ranks.watchdog import START_MINUTES

logger = logging.getLogger(__name__)

# Ranks start together, but may need minutes to import their libraries from a busy file system.
MEETING_TIMEOUT = timedelta(minutes=10)
# Minutes by which a collective's timeout exceeds the watchdog's: the watchdog, which shows where a rank hangs, must
# act first.
MARGIN_MINUTES = 10.0
STARTING_TIMEOUT = timedelta(minutes=START_MINUTES + MARGIN_MINUTES)

_started = False
_store: dist.Store | None = None


def is_started() -> bool:
    """Whether this process has called `start`. If so, it must exit through `failure.exit_rank`."""
    return _started


def store() -> dist.Store | None:
    """The store at which the ranks met; None before they have met."""
    return _store


def start() -> None:
    """Make the process group from torchrun's variables, with NCCL on a machine with GPUs and with gloo otherwise.

    Raises:
        RunError: a rank was missing after MEETING_TIMEOUT; the message names it and the address of the store.
    """
    global _started, _store
    _started = True
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    _store = _meet(rank, size)
    dist.init_process_group(
        "nccl" if torch.cuda.is_available() else "gloo",
        store=_store,
        rank=rank,
        world_size=size,
        timeout=STARTING_TIMEOUT,
    )


def _meet(rank: int, size: int) -> dist.Store:
    """The store at MASTER_ADDR:MASTER_PORT, once every rank has registered there."""
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    minutes = f"{MEETING_TIMEOUT.total_seconds() / 60:g} minutes"
    store = dist.PrefixStore(f"megabase/{_attempt()}", _connect(rank, place, minutes))
    arrivals = [f"rank {number}" for number in range(size)]
    store.set(arrivals[rank], platform.node())
    try:
        store.wait(arrivals, MEETING_TIMEOUT)
    except dist.DistError:
        missing = [name for name in arrivals if not store.check([name])]
        named = ", ".join(missing[:8]) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
        raise RunError(
            f"{named} of {size} did not connect to {place} within {minutes}: look in the log for why they ended, and"
            f" whether their nodes reach {place}"
        ) from None
    return store


def _connect(rank: int, place: str, minutes: str) -> dist.Store:
    """Open the store on rank 0, or connect to it. place, minutes: address and timeout, for the message."""
    # torchrun hosts the store in its agent, one store for all restarts of the ranks.
    hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        return dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=rank == 0 and not hosted,
            timeout=MEETING_TIMEOUT,
            wait_for_workers=False,
        )
    except dist.DistError as error:
        problem = (
            f"rank {rank} on {platform.node()} cannot {'open' if rank == 0 else 'reach'} the store at {place}"
            f" within {minutes} ({first_line(error)}). Check that the address is that of rank 0's node, that the port"
            " is free there and open between nodes, and that rank 0 started"
        )
        if rank:  # rank 0 reports errors for all ranks, but does not have this one
            logger.error(problem)
        raise RunError(problem) from None


def _attempt() -> str:
    """Number of torchrun's restarts: ranks of different attempts must not meet."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
