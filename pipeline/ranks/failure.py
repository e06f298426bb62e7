"""How a failing rank reports its error, so that a run reports each error once, and how a rank exits.

Often all ranks fail with the same error. Then rank 0 reports it, and the others report nothing. A rank that fails alone
reports its error with its rank and host. After a rank has died, each other rank loses its connection and prints a line.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import time
import traceback
from contextlib import suppress
from datetime import timedelta
from typing import NoReturn

import torch.distributed as dist

from megabase.datamodules.errors import DataError
from megabase.models.config import ConfigError
from megabase.pipeline.errors import RunError, UserError
from megabase.pipeline.ranks import rendezvous
from megabase.pipeline.ranks.environment import is_rank_zero, node_name, rank_name
from megabase.pipeline.rundir.status import write_rank_failure

logger = logging.getLogger(__name__)

# Seconds that a failing rank waits for rank 0's report; must be well below `supervisor.GRACE_S`.
REPORT_WAIT_S = 2.0
# The key that rank 0 sets in the store when it has reported why it fails.
_REPORTED = "rank 0 has reported why it fails"
# How gloo and NCCL report that another rank's process has ended.
_PEER_LOST = re.compile(
    r"connection (closed|reset|refused)|broken pipe|remote process exited|socket.*closed", re.IGNORECASE
)


def exit_rank(code: int) -> NoReturn:
    """End this process without the interpreter's teardown, in which threads of the libraries may abort (SIGABRT).

    A run that finished, or failed with a message, must not look like one that crashed.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def report_failure(error: BaseException) -> None:
    """Print on stderr why this process fails: one line for an error that a user can act on, else a traceback.

    An error is reported once, however often this is called with it. KeyboardInterrupt is not reported.

    Args:
        error: what ends this process.
    """
    if getattr(error, "reported", False) or isinstance(error, KeyboardInterrupt):
        return
    error.reported = True  # type: ignore[attr-defined]
    name = f"rank {rank_name()} on {node_name()}: "
    line = ""
    if isinstance(error, UserError | RunError | DataError | ConfigError):
        if not is_rank_zero() and _rank_zero_reports():
            return
        line = ("" if is_rank_zero() else name) + " ".join(str(error).split())
        if not is_rank_zero():  # rank 0 has not failed in this way
            write_rank_failure(rank_name(), node_name())
    elif isinstance(error, RuntimeError) and (lost := _PEER_LOST.search(str(error))):
        line = (
            f"{name}lost the connection to another rank ({lost[0].lower()}): that rank's own message above, or in the"
            " log of its node, says why"
        )
    else:
        traceback.print_exception(error)
        write_rank_failure(rank_name(), node_name())
    if line:
        logger.error(line)
    store = rendezvous.store()
    if store is not None and is_rank_zero():
        with suppress(dist.DistError):
            store.set(_REPORTED, "")
        time.sleep(REPORT_WAIT_S / 2)  # the store ends with this process


def _rank_zero_reports() -> bool:
    """Wait up to REPORT_WAIT_S seconds for rank 0's report; returns whether it came."""
    store = rendezvous.store()
    if store is None:
        # The ranks have not met yet. If rank 0 fails as well, the launcher ends this process during this sleep.
        time.sleep(REPORT_WAIT_S)
        return False
    try:
        store.wait([_REPORTED], timedelta(seconds=REPORT_WAIT_S))
    except dist.DistStoreError:
        return False
    except dist.DistError:  # rank 0 has ended, and the store with it
        return True
    return True
