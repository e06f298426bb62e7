"""Shared by the tests of the pipeline."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch.distributed as dist

from megabase.pipeline import log
from megabase.pipeline.ranks.groups import Group


@pytest.fixture(autouse=True)
def messages_on_stderr() -> None:
    """Messages go to stderr, as they do for commands. `tests/conftest.py` ends that after each test."""
    log.set_up()


@pytest.fixture(scope="module")
def ranks() -> Iterator[Group]:
    """One rank in a real process group."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield Group.of_all_ranks()
    dist.destroy_process_group()
