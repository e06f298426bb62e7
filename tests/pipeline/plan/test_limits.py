"""What fits: searches over the model of memory."""

import dataclasses

from hypothesis import given, settings
from hypothesis import strategies as st

from megabase.pipeline.config.load import load
from megabase.pipeline.config.schema import RunConfig
from megabase.pipeline.plan.limits import Fitting, changed, divisors, largest, on_ranks
from megabase.pipeline.plan.profiles import read_profile

H100 = read_profile("h100")
SETTINGS = ["run.name=x", "data.shards=s", "trainer.devices=8", "data.global_batch=64", "data.length=65536"]


def config_of(*settings: str) -> RunConfig:
    return load([], [*SETTINGS, *settings])


@given(st.integers(1, 500))
def test_divisors(number: int) -> None:
    assert divisors(number) == [each for each in range(1, number + 1) if number % each == 0]


@given(st.integers(0, 10**6), st.integers(1, 10**6))
def test_the_largest_number_that_fits(border: int, most: int) -> None:
    assert largest(lambda number: number <= border, most) == min(border, most)


def test_the_longest_window_fits_and_a_longer_one_does_not() -> None:
    fitting, config = Fitting(10**8, "bf16", H100), config_of("trainer.sequence_ranks=2")
    longest = fitting.longest(config)
    assert longest % 2048 == 0
    assert fitting.space(changed(config, "data.length", longest)).fits
    assert not fitting.space(changed(config, "data.length", longest + 2048)).fits


def test_the_largest_micro_batch_divides_the_share_of_a_rank() -> None:
    fitting, config = Fitting(10**8, "bf16", H100), config_of("data.global_batch=96")
    assert fitting.largest_micro_batch(config) == 12
    assert fitting.largest_micro_batch(changed(config, "data.length", 1 << 30)) == 0


def test_the_fewest_ranks_of_states_that_need_several() -> None:
    # 12 + 2 + 2 bytes of 10 billion parameters: 149 GiB, of which stage 3 shards all.
    fitting, config = Fitting(10**10, "bf16", H100), config_of("zero.stage=3", "data.length=1024")
    fewest = fitting.fewest_ranks(config)
    assert fewest == 4
    before = on_ranks(config, 2, 8)
    assert before is not None and not fitting.fits(before)


def test_a_smaller_micro_batch_is_the_nearest_change() -> None:
    config = config_of("data.micro_batch=8", "data.length=1048576")
    fitting = Fitting(10**8, "bf16", dataclasses.replace(H100, memory_gib=42.0))
    assert not fitting.space(config).fits
    nearest = fitting.nearest(config)
    assert nearest is not None and len(nearest) == 1
    key, size = nearest[0].split("=")
    assert key == "data.micro_batch" and int(size) in (1, 2, 4)
    assert fitting.fits(changed(config, key, int(size)))
    assert not fitting.fits(changed(config, key, 2 * int(size)))


def test_states_that_do_not_fit_are_sharded() -> None:
    config = config_of("zero.stage=2", "trainer.nodes=8")
    fitting = Fitting(4 * 10**10, "bf16", H100)
    assert not fitting.space(config).fits
    assert fitting.nearest(config) == ["zero.stage=3"]


def test_a_window_that_one_rank_cannot_hold_is_shared() -> None:
    config = config_of("data.length=4194304", "model.heads=8", "model.dim=1024", "data.global_batch=8")
    found = Fitting(10**8, "bf16", H100).nearest(config)
    assert found and found[0].startswith("trainer.sequence_ranks=")


def test_what_is_sharded_decreases_with_more_ranks() -> None:
    config = config_of("zero.stage=3", "data.length=1024")
    needed = [
        Fitting(10**9, "bf16", H100).space(changed(config, "trainer.nodes", nodes)).needed
        for nodes in (1, 2, 4)
    ]
    assert needed == sorted(needed, reverse=True) and len(set(needed)) == 3


@settings(max_examples=20)
@given(st.sampled_from(["data.length", "data.micro_batch"]), st.integers(0, 6), st.integers(0, 3))
def test_a_longer_window_or_more_of_them_never_need_less(key: str, power: int, stage: int) -> None:
    fitting, config = Fitting(10**7, "bf16", H100), changed(config_of(), "zero.stage", stage)
    section, name = key.split(".")
    small = changed(config, key, 2**power * (1024 if name == "length" else 1))
    large = changed(config, key, getattr(getattr(small, section), name) * 2)
    assert fitting.space(large).needed >= fitting.space(small).needed
