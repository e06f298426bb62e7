"""Looking windows up in a plan."""

import numpy as np
import pytest

from megabase.datamodules.index.shard_index import ShardIndex
from megabase.datamodules.order.planning import plan_windows


@pytest.mark.parametrize("split", ["train", "valid", "test"])
@pytest.mark.parametrize(("min_real", "stride"), [(0.0, None), (0.6, None), (0.6, 7)])
def test_windows_of_a_row_are_those_located_in_it(
    gappy_shards: ShardIndex, split: str, min_real: float, stride: int | None
) -> None:
    plan = plan_windows(gappy_shards.segments, split, 64, min_real, stride=stride)
    rows, _ = plan.locate(np.arange(len(plan)))
    for row in range(len(gappy_shards.segments)):
        assert plan.ids_of_row(row).tolist() == np.flatnonzero(rows == row).tolist()


@pytest.mark.parametrize("outside", [-1, 10**6])
def test_an_id_outside_the_plan_is_an_error(gappy_shards: ShardIndex, outside: int) -> None:
    plan = plan_windows(gappy_shards.segments, "train", 64)
    with pytest.raises(IndexError, match=f"window ids of split 'train' must lie in \\[0, {len(plan)}\\)"):
        plan.locate(np.array([0, outside]))
