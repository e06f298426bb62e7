"""The rendezvous of the ranks: they connect to a TCP store and make torch's process group.

The store is at MASTER_ADDR:MASTER_PORT. Without MASTER_PORT, rank 0 takes a free port and publishes the address in the
file MEGABASE_MEETING_FILE, in a directory that all nodes see: no port must be guessed that another job may have taken.
The group is made before Lightning's Trainer, so that ranks can agree on a checkpoint before anything is built.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from megabase.datamodules.files import publish_json
from megabase.pipeline.errors import RunError, first_line
from megabase.pipeline.ranks.environment import MEETING_FILE
from megabase.pipeline.ranks.network import INTERFACE, address_of, choose_interface
from megabase.pipeline.ranks.watchdog import START_MINUTES

logger = logging.getLogger(__name__)

# Seconds between two looks for the file in which rank 0 says where the ranks meet.
POLL_S = 0.2

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
        RunError: temporary: a rank was missing after MEETING_TIMEOUT; the message names it and the store's address.
    """
    global _started, _store
    _started = True
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    choose_interface()
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
    """The store, once every rank has registered there. Sets MASTER_ADDR and MASTER_PORT."""
    minutes = f"{MEETING_TIMEOUT.total_seconds() / 60:g} minutes"
    if rank and "MASTER_PORT" not in os.environ:
        _read_meeting(rank, minutes)
    store = dist.PrefixStore(f"megabase/{_attempt()}", _connect(rank, minutes))
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    arrivals = [f"rank {number}" for number in range(size)]
    store.set(arrivals[rank], platform.node())
    try:
        store.wait(arrivals, MEETING_TIMEOUT)
    except dist.DistError:
        missing = [name for name in arrivals if not store.check([name])]
        named = ", ".join(missing[:8]) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
        raise RunError(
            f"{named} of {size} did not connect to {place} within {minutes}: look in the log for why they ended, and"
            f" whether their nodes reach {place}",
            temporary=True,
        ) from None
    return store


def _connect(rank: int, minutes: str) -> dist.Store:
    """Open the store on rank 0, or connect to it. minutes: the timeout, for the message."""
    # torchrun hosts the store in its agent, one store for all restarts of the ranks.
    hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    port = int(os.environ.get("MASTER_PORT", 0))
    try:
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            port,
            is_master=rank == 0 and not hosted,
            timeout=MEETING_TIMEOUT,
            wait_for_workers=False,
        )
        if not port:
            _publish_meeting(store.port)
        return store
    except dist.DistError as error:
        place = f"{os.environ['MASTER_ADDR']}:{port}"
        problem = (
            f"rank {rank} on {platform.node()} cannot {'open' if rank == 0 else 'reach'} the store at {place}"
            f" within {minutes} ({first_line(error)}). Check that the address is that of rank 0's node, that the port"
            " is free there and open between nodes, and that rank 0 started"
        )
        if rank:  # rank 0 reports errors for all ranks, but does not have this one
            logger.error(problem)
        raise RunError(problem, temporary=True) from None


def _publish_meeting(port: int) -> None:
    """On rank 0: set MASTER_ADDR and MASTER_PORT, and write them to MEGABASE_MEETING_FILE.

    The address is that of the interface that GLOO_SOCKET_IFNAME names, if it is set.
    """
    interface = os.environ.get(INTERFACE)
    if interface and (address := address_of(interface)):
        os.environ["MASTER_ADDR"] = address
    os.environ["MASTER_PORT"] = str(port)
    path = Path(os.environ[MEETING_FILE])
    try:
        publish_json(path, {"address": os.environ["MASTER_ADDR"], "port": port})
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror}", temporary=True) from None


def _read_meeting(rank: int, minutes: str) -> None:
    """On the other ranks: wait for the file, and set MASTER_ADDR and MASTER_PORT."""
    path = Path(os.environ[MEETING_FILE])
    deadline = time.monotonic() + MEETING_TIMEOUT.total_seconds()
    while time.monotonic() < deadline:
        with suppress(OSError, ValueError, KeyError):
            found = json.loads(path.read_bytes())
            os.environ |= {"MASTER_ADDR": str(found["address"]), "MASTER_PORT": str(found["port"])}
            return
        time.sleep(POLL_S)
    problem = (
        f"rank {rank} on {platform.node()}: rank 0 has not written {path} within {minutes}: look in the log for why it"
        " ended, and whether all nodes see that directory"
    )
    logger.error(problem)  # rank 0 reports errors for all ranks, but does not have this one
    raise RunError(problem, temporary=True)


def _attempt() -> str:
    """Number of torchrun's restarts: ranks of different attempts must not meet."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
