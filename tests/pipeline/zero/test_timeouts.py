"""Collectives wait longer than the watchdog."""

from datetime import timedelta

import torch
import torch.distributed as dist

from megabase.pipeline.zero.timeouts import set_collective_timeouts


def test_collectives_of_every_group_wait_longer_than_the_watchdog() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        groups = [dist.group.WORLD, dist.new_group([0])]
        for hang, minutes in ((60.0, 70), (0.1, 40), (0.0, 24 * 60)):
            set_collective_timeouts(hang)
            for group in groups:
                timeout = group._get_backend(torch.device("cpu")).options._timeout
                assert timeout == timedelta(minutes=minutes)
    finally:
        dist.destroy_process_group()
