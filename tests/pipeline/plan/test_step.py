"""The time of a step: by hand, and how it grows."""

import dataclasses

import pytest

from megabase.pipeline.config.load import load
from megabase.pipeline.plan.batches import batches_of
from megabase.pipeline.plan.limits import ranks_of
from megabase.pipeline.plan.profiles import Achieved, Profile
from megabase.pipeline.plan.step import MOVED_BYTES, STREAM_BYTES, StepTime, step_time

FULL = dict.fromkeys(("products", "lsh", "attention", "memory", "node", "network"), 1.0)
GPU = Profile(
    device="cuda",
    peak_tflops={"bf16": 1.0},
    memory_gb_s=1.0,
    node_gb_s=1.0,
    host_gb_s=2.0,
    network_gb_s=0.5,
    achieved=Achieved(**FULL),
    name="test",
)
SETTINGS = [
    "run.name=x",
    "data.shards=s",
    "model.dim=64",
    "model.heads=4",
    "model.depth=2",
    "model.vocab_size=9",
]


def time_of(*settings: str, profile: Profile = GPU, parameters: int = 1000) -> StepTime:
    config = load([], [*SETTINGS, "data.length=1024", "trainer.devices=2", *settings])
    return step_time(config, parameters, batches_of(config, ranks_of(config), None), "bf16", profile)


def test_the_parts_of_a_step() -> None:
    step = time_of(
        "data.global_batch=4", "model.layers=[lsh]", "model.lsh.rounds=2", "model.lsh.chunk_length=32"
    )
    positions = 2 * 1024  # of two micro batches
    # 4 passes x 2 layers x 4 FLOPs for each of 64 channels and 2 x 32 keys.
    assert step.attention == pytest.approx(positions * 4 * 2 * 4 * 64 * 64 / 1e12)
    assert step.streams == pytest.approx(positions * STREAM_BYTES * 64 * 4 / 1e9)
    # All-reduce of 2 bytes after each of two micro batches, a gather of the weights: between 2 ranks half of each.
    assert step.reduction == pytest.approx((2 * 2 * 2000 + 2000) / 2 / 1e9)
    assert step.exchange == step.launches == step.moving == 0
    moved = time_of("data.global_batch=4", "trainer.offload_streams=host").moving
    assert moved == pytest.approx(positions * MOVED_BYTES * 64 * 4 / 2e9)
    assert step.total == pytest.approx(sum(vars(step).values()))


def test_the_device_waits_for_launches_only_if_they_take_longer() -> None:
    slow = dataclasses.replace(GPU, launch_ms=1000.0)
    step = time_of("data.global_batch=2", profile=slow)
    assert step.limit == "launches"
    # Four branches.
    assert step.products + step.attention + step.streams + step.launches == pytest.approx(4.0)
    assert time_of("data.global_batch=2", profile=dataclasses.replace(GPU, launch_ms=1e-6)).launches == 0


def test_sharing_a_window_halves_the_work_of_a_rank_and_adds_an_exchange() -> None:
    alone = time_of("data.global_batch=2", "trainer.devices=2")
    shared = time_of("data.global_batch=2", "trainer.devices=4", "trainer.sequence_ranks=2")
    assert shared.products == pytest.approx(alone.products / 2)
    assert shared.exchange > 0


def test_what_takes_the_longest_is_the_limit() -> None:
    nothing = dict.fromkeys((field.name for field in dataclasses.fields(StepTime)), 0.0)
    assert StepTime(**{**nothing, "products": 2.0, "reduction": 1.0}).limit == "compute"
    talking = StepTime(**{**nothing, "products": 2.0, "reduction": 3.0})
    assert talking.limit == "communication" and talking.shares["compute"] == 0.4


def test_with_overlap_only_the_gather_of_the_weights_and_what_takes_longer_than_backward_is_waited_for() -> (
    None
):
    settings = ["data.global_batch=2", "data.length=65536"]
    apart, together = (time_of(*settings, f"zero.overlap_comm={value}") for value in ("false", "true"))
    assert together.reduction == pytest.approx(2000 / 2 / 1e9)  # the gather
    assert together.total < apart.total
    slow = time_of(*settings, "zero.overlap_comm=true", parameters=10**12)
    assert slow.reduction > 100
