"""Settings of the data that cannot work, and the arithmetic of batch sizes."""

from typing import Any

import pytest
from omegaconf import OmegaConf

from megabase.datamodules.config import DataConfig, accumulation
from megabase.datamodules.errors import DataError
from megabase.datamodules.index.shard_index import ShardIndex
from tests.datamodules.loading import module


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"length": 40_000}, "split 'train' has no window of data.length 40000"),
        ({"micro_batch": 3}, "data.global_batch 8 is not a multiple of data.micro_batch 3 x 1 ranks"),
        ({"workers": -1}, "data.workers -1"),
        ({"objective": "mask"}, "data.objective 'mask': choose causal or masked"),
        ({"mask_rate": 0.0}, "data.mask_rate 0.0"),
        ({"mask_rate": 1.5}, "data.mask_rate 1.5"),
        ({"stride": 0}, "data.stride 0: must be at least 1 base, or null for data.length"),
        ({"shift": -1}, "data.shift -1: must be 0 or more bases"),
        ({"reverse_complement": 1.5}, "data.reverse_complement 1.5: must lie between 0 and 1"),
        ({"reverse_complement": float("nan")}, "data.reverse_complement nan: must lie between 0 and 1"),
        ({"softmask_weight": -0.1}, "data.softmask_weight -0.1: must lie between 0 and 1"),
        ({"mixture": {"a.fa": -1.0}}, "data.mixture 'a.fa': weight -1.0 must be 0 or more"),
        ({"mixture": {"a.fa": float("inf")}}, "data.mixture 'a.fa': weight inf must be 0 or more"),
        ({"mixture": {"a": {"fa": 2.0}}}, "data.mixture 'a': {'fa': 2.0} is not a number"),
        ({"mixture": {"a.fa": 0.0}}, "data.mixture: every weight is 0"),
        (
            {"mixture": {"other.fa": 1.0}},
            "data.mixture: 'other.fa' matches no record .* 'lambda_phage.fna.gz'",
        ),
        (
            {"mixture": {"a": 1e-4, "b": 1.0}},
            "data.mixture: weight 0.0001 is less than 1/1024 of all weights",
        ),
        ({"on_error": "ignore"}, "data.on_error 'ignore': choose raise or skip"),
        ({"prefetch": 0}, "data.prefetch 0: must be at least 1 batch"),
    ],
)
def test_setup_refuses_what_cannot_work(
    lambda_shards: ShardIndex, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        module(lambda_shards, **settings)


def test_accumulation_makes_the_global_batch_exactly() -> None:
    assert accumulation(512, 4, 16) == 8
    assert accumulation(8, 8, 1) == 1


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            (10, 4, 2),
            "10 is not a multiple of data.micro_batch 4 x 2 ranks: set data.micro_batch to one of 1, 5",
        ),
        ((10, 4, 2), "1, 5, or data.global_batch to 8 or 16$"),
        ((8, 1, 3), "x 3 ranks: set data.global_batch to 6 or 9$"),
        ((2, 1, 4), "x 4 ranks: set data.global_batch to 4$"),
        ((5040, 11, 1), r"1, 2, 3, 4, \.\.\., 1260, 1680, 2520, 5040, or data.global_batch to 5038 or 5049$"),
        ((0, 1, 1), "data.global_batch 0: must be at least 1"),
        ((4, 0, 1), "data.micro_batch 0: must be at least 1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_those_that_would(
    sizes: tuple[int, int, int], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        accumulation(*sizes)


def test_the_config_is_a_schema_for_omegaconf() -> None:
    config = OmegaConf.merge(OmegaConf.structured(DataConfig), OmegaConf.from_dotlist(["length=64"]))
    assert config.length == 64
    assert OmegaConf.missing_keys(config) == {"shards"}
