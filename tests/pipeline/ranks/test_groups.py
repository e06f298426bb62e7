"""Groups of ranks."""

import pytest
import torch

from megabase.pipeline.errors import RunError
from megabase.pipeline.ranks.groups import Group, Groups


def test_a_group_of_one_rank(ranks: Group) -> None:
    assert (ranks.rank, ranks.size) == (0, 1)
    assert ranks.broadcast({"a": 1}) == {"a": 1} and ranks.gather("x") == ["x"]
    counters = torch.tensor([3, 4])
    ranks.sum_async(counters).wait()
    assert counters.tolist() == [3, 4]


def test_an_error_of_one_rank_is_raised_and_may_be_temporary(ranks: Group) -> None:
    ranks.check(None)
    for temporary in (False, True):
        with pytest.raises(RunError, match="rank 0: no disk") as caught:
            ranks.check("no disk", temporary=temporary)
        assert caught.value.temporary == temporary


def test_every_process_trains_on_windows_of_its_own(ranks: Group) -> None:
    groups = Groups.create()
    assert groups.data_size == groups.world.size == 1
    assert groups.holds_start and groups.part(10) is None


def test_losses_of_ranks_that_share_windows_are_summed(ranks: Group) -> None:
    groups = Groups(ranks, sequence_ranks=2)
    assert groups.summed([[1.0, 2.0], [10.0, 20.0], [3.0, 4.0], [30.0, 40.0]]) == [[11.0, 22.0], [33.0, 44.0]]
