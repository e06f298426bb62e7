"""Shared by the tests of the pipeline."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch.distributed as dist

from megabase.pipeline.ranks.launch import Ranks


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    """One rank in a real process group."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield Ranks()
    dist.destroy_process_group()
