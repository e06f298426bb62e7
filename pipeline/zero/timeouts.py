"""The timeouts of collectives."""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist

from megabase.pipeline.ranks.rendezvous import MARGIN_MINUTES
from megabase.pipeline.ranks.watchdog import START_MINUTES

_WITHOUT_WATCHDOG_MINUTES = 24.0 * 60


def set_collective_timeouts(hang_minutes: float) -> None:
    """Make the collectives of every existing group wait longer than the watchdog does.

    So the watchdog, which knows where a rank hangs, acts first. DeepSpeed makes its groups with torch's default
    timeout, which is 10 minutes for NCCL.

    Args:
        hang_minutes: `trainer.hang_minutes`. 0: there is no watchdog, and collectives wait for a day.
    """
    minutes = max(hang_minutes, START_MINUTES) + MARGIN_MINUTES if hang_minutes else _WITHOUT_WATCHDOG_MINUTES
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(timedelta(minutes=minutes), group)
