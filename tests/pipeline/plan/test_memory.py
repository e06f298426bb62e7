"""What a rank keeps, by ZeRO stage."""

import pytest

from megabase.pipeline.config.load import load
from megabase.pipeline.plan.memory import DEVICE, DISK, HOST, memory_of


@pytest.mark.parametrize(
    ("stage", "precision", "bytes_of_a_parameter"),
    [
        (0, "32", 4 + 4 + 8),
        (0, "bf16", 2 + 2 + 12),
        (1, "bf16", 2 + 2 + 12 / 4),
        (2, "bf16", 2 + 2 / 4 + 12 / 4),
        (2, "32", 4 + 4 / 4 + 12 / 4),
        (3, "bf16", (2 + 2 + 12) / 4),
    ],
)
def test_states_of_a_rank(stage: int, precision: str, bytes_of_a_parameter: float) -> None:
    config = load([], ["run.name=x", "data.shards=s", f"zero.stage={stage}"])
    memory = memory_of(config, 1000, 4, precision)
    assert memory.total(DEVICE) == 1000 * bytes_of_a_parameter
    assert memory.total(HOST) == memory.total(DISK) == 0


def test_offloaded_states_are_elsewhere() -> None:
    stage = ["zero.stage=3", "zero.offload=nvme", "zero.nvme_path=d", "zero.offload_parameters=cpu"]
    config = load([], ["run.name=x", "data.shards=s", "checkpoint.background=false", *stage])
    memory = memory_of(config, 1000, 4, "bf16")
    # docs/zero.md: 16 bytes on the disk for each parameter that a rank keeps.
    assert [memory.total(place) for place in (DEVICE, HOST, DISK)] == [500, 500, 250 * 16]


def test_streams_do_not_depend_on_depth() -> None:
    settings = ["run.name=x", "data.shards=s", "model.dim=64", "data.length=512", "data.micro_batch=2"]
    sizes = [
        memory_of(load([], [*settings, f"model.depth={depth}"]), 1, 1, "32").streams for depth in (2, 24)
    ]
    # Two streams of int32 and their gradients in fp32.
    assert sizes == [4 * 4 * 64 * 512 * 2] * 2
