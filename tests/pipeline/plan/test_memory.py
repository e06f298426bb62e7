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
    memory = memory_of(config, 1000, 4, precision, "cuda")
    assert memory.total(DEVICE) == 1000 * bytes_of_a_parameter
    assert memory.total(HOST) == memory.total(DISK) == 0


def test_offloaded_states_are_elsewhere() -> None:
    stage = ["zero.stage=3", "zero.offload=nvme", "zero.nvme_path=d", "zero.offload_parameters=cpu"]
    config = load([], ["run.name=x", "data.shards=s", "checkpoint.background=false", *stage])
    memory = memory_of(config, 1000, 4, "bf16", "cuda")
    # docs/zero.md: 16 bytes on the disk for each parameter that a rank keeps.
    assert [memory.total(place) for place in (DEVICE, HOST, DISK)] == [500, 500, 250 * 16]


def parts_of(*settings: str, parameters: int = 1, ranks: int = 1, device: str = "cuda") -> dict[str, int]:
    config = load([], ["run.name=x", "data.shards=s", "model.dim=64", "data.length=512", *settings])
    precision = "32" if device == "cpu" else "bf16"
    return {part.name: part.bytes for part in memory_of(config, parameters, ranks, precision, device).work}


def test_streams_do_not_depend_on_depth_and_are_shared_with_the_window() -> None:
    def streams(*settings: str) -> int:
        return parts_of("data.micro_batch=2", *settings)["streams and their gradients"]

    # Two streams of int32 and their gradients in fp32.
    assert streams("model.depth=2") == streams("model.depth=24") == 4 * 4 * 64 * 512 * 2
    assert streams("trainer.sequence_ranks=2") == 4 * 4 * 64 * 512


def test_streams_in_host_memory_are_not_on_the_device() -> None:
    def peaks(where: str) -> list[int]:
        settings = ["run.name=x", "data.shards=s", "data.length=65536", f"trainer.offload_streams={where}"]
        memory = memory_of(load([], settings), 1000, 1, "bf16", "cuda")
        return [memory.peak(place) for place in (DEVICE, HOST)]

    (device, host), (less, more) = peaks("none"), peaks("host")
    assert device - less == more - host == 16 * 256 * 65536


def test_buckets_and_gathered_weights_by_stage() -> None:
    mebibyte = 1 << 20
    assert "bucket of gradients" not in parts_of("zero.stage=0")
    assert parts_of("zero.stage=1", "zero.bucket_mb=3")["bucket of gradients"] == 3 * mebibyte
    # On CPUs pages that are never written do not count.
    assert parts_of("zero.stage=1", parameters=100, device="cpu")["bucket of gradients"] == 400
    assert parts_of("zero.overlap_comm=true", "zero.bucket_mb=3")["bucket of gradients"] == 6 * mebibyte
    assert "gathered weights" not in parts_of("zero.stage=2")
    group = "zero.deepspeed.zero_optimization.zero_hpz_partition_size=8"
    assert parts_of("zero.stage=3", group, parameters=1000)["second copy of the weights (hpZ)"] == 250
    assert parts_of("zero.stage=3", parameters=1000, ranks=8)["gathered weights"] == 2000


def test_a_rank_needs_the_most_in_the_pass_or_in_the_update() -> None:
    def peak(length: int) -> int:
        config = load([], ["run.name=x", "data.shards=s", f"data.length={length}", "zero.stage=0"])
        return memory_of(config, 10**6, 1, "bf16", "cuda").peak(DEVICE)

    states = 10**6 * (2 + 2 + 12)
    assert peak(1) == states + 10**6 * 8  # the update: fp32 gradients and AdamW's denominator
    assert peak(1 << 20) > states + 16 * 256 * (1 << 20)  # the pass: streams, and the work of a branch


def test_a_background_checkpoint_needs_a_copy_in_host_memory() -> None:
    name = "copy for a checkpoint in the background"
    assert name not in parts_of()
    assert parts_of("checkpoint.background=true", parameters=1000, ranks=4)[name] == 12 * 250
