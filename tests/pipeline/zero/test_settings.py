"""From the settings of a run to DeepSpeed's configuration."""

from pathlib import Path

import pytest
import torch

from megabase.pipeline.config.keys import dotted
from megabase.pipeline.config.load import load as load_config
from megabase.pipeline.config.load import save
from megabase.pipeline.config.schema import RunConfig
from megabase.pipeline.errors import UserError
from megabase.pipeline.training.check import check
from megabase.pipeline.zero.settings import check_engine, check_overlap, deepspeed_config, layout_options

KEY = "zero.deepspeed"
ZERO = f"{KEY}.zero_optimization"


def load(*settings: str) -> RunConfig:
    return load_config([], ["run.name=x", "data.shards=somewhere", *settings])


@pytest.mark.parametrize(
    ("spelling", "means"),
    [("true", "cpu"), ("false", "none"), ("True", "cpu"), ("cpu", "cpu"), ("none", "none")],
)
def test_offload_takes_two_spellings_and_is_read_back_from_a_saved_config(
    tmp_path: Path, spelling: str, means: str
) -> None:
    written = tmp_path / "a.yaml"
    written.write_text(f"zero: {{offload: {spelling}}}")
    config = load_config([written], ["run.name=x", "data.shards=somewhere"])
    assert config.zero.offload == load(f"zero.offload={spelling}").zero.offload == means
    offloads = deepspeed_config(config)["zero_optimization"].get("offload_optimizer", {"device": "none"})
    assert offloads["device"] == means
    saved = tmp_path / "config.yaml"
    save(config, saved)
    assert load_config([saved]) == config


def test_precision_adds_its_own_section() -> None:
    assert deepspeed_config(load("trainer.precision=bf16"))["bf16"] == {"enabled": True}
    half = load("trainer.precision=16", f"{KEY}.fp16.initial_scale_power=8", f"{KEY}.fp16.hysteresis=1")
    made = deepspeed_config(half)["fp16"]
    assert made["enabled"] and made["loss_scale"] == 0 and made["loss_scale_window"] == 1000
    assert (made["initial_scale_power"], made["hysteresis"]) == (8, 1)
    plain = deepspeed_config(load("trainer.precision=32"))
    assert "bf16" not in plain and "fp16" not in plain


def test_a_bucket_has_the_same_bytes_in_every_precision() -> None:
    sizes = [
        deepspeed_config(load(f"trainer.precision={precision}"))["zero_optimization"]["reduce_bucket_size"]
        for precision in ("32", "bf16", "16")
    ]
    assert sizes == [sizes[0], 2 * sizes[0], 2 * sizes[0]]


def test_the_layout_of_a_checkpoint_changes_with_the_keys_that_order_states() -> None:
    plain, other, same = (
        layout_options(dotted(load(*settings)))
        for settings in ([], [f"{ZERO}.round_robin_gradients=true"], ["zero.bucket_mb=3"])
    )
    assert plain == same != other


def test_overlap_needs_sharded_states() -> None:
    for stage in (1, 2, 3):
        config = load(f"zero.stage={stage}", "zero.overlap_comm=true")
        config.validate()
        assert deepspeed_config(config)["zero_optimization"]["overlap_comm"] is True
    assert deepspeed_config(load())["zero_optimization"]["overlap_comm"] is False
    with pytest.raises(
        UserError, match=r"zero\.overlap_comm=true has an effect only with zero\.stage=1, 2 or 3"
    ):
        load("zero.stage=0", "zero.overlap_comm=true").validate()


@pytest.mark.parametrize("precision", ["32", "bf16"])
def test_overlap_needs_a_bucket_that_holds_the_largest_parameter(precision: str) -> None:
    elements = 2**20 // (4 if precision == "32" else 2)
    small, large = (torch.empty(n, device="meta") for n in (elements, 2 * elements + 1))
    one = [f"trainer.precision={precision}", "zero.bucket_mb=1"]
    check_overlap(load(*one, "zero.overlap_comm=true"), [("small", small)])
    check_overlap(load(*one), [("large", large)])
    check_overlap(
        load(*one, "zero.overlap_comm=true", "zero.stage=3"), [("large", large), ("small", small[:9])]
    )
    with pytest.raises(UserError, match=r"large has [\d,]+ elements.*set zero.bucket_mb=3, or") as caught:
        check_overlap(load(*one, "zero.overlap_comm=true"), [("small", small), ("large", large)])
    assert "zero.bucket_mb=1:" in str(caught.value)
    check_overlap(load(one[0], "zero.bucket_mb=3", "zero.overlap_comm=true"), [("large", large)])


@pytest.mark.slow
def test_a_run_that_timing_would_decide_is_refused_before_it_starts(lambda_shards: Path) -> None:
    table = ["model.positions=learned", "model.max_length=8192", "model.dim=256", "zero.bucket_mb=4"]
    settings = [
        "run.name=x",
        f"data.shards={lambda_shards}",
        "data.length=1024",
        "trainer.precision=32",
        *table,
    ]
    with pytest.raises(UserError, match=r"body\.embedding\.positions\.table has 2,097,152 elements"):
        check(load_config([], [*settings, "zero.overlap_comm=true"]), 1)
    check(load_config([], settings), 1)


@pytest.mark.parametrize(
    ("thresholds", "fine"),
    [
        ([], True),
        (["param_persistence_threshold=0"], False),
        (["param_persistence_threshold=99"], False),
        (["param_persistence_threshold=100"], True),
        (["model_persistence_threshold=99"], False),
    ],
)
def test_overlap_in_stage_3_needs_a_parameter_that_stays_gathered(thresholds: list[str], fine: bool) -> None:
    keys = [f"{ZERO}.stage3_{threshold}" for threshold in thresholds]
    config = load("zero.stage=3", "zero.overlap_comm=true", *keys)
    parameters = [(name, torch.empty(n, device="meta")) for name, n in {"norm": 100, "weight": 10**6}.items()]
    if fine:
        check_overlap(config, parameters)
        return
    with pytest.raises(UserError, match=r"every parameter has more elements than .*persistence_threshold"):
        check_overlap(config, parameters)


def test_the_settings_of_the_engine_are_compared_with_those_of_the_run() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    class Engine:
        """Stands for DeepSpeed's engine on one rank."""

        dp_world_size = 1

        def __init__(self, stage: int) -> None:
            self._config = type(
                "Config", (), {"zero_config": DeepSpeedZeroConfig(stage=stage, overlap_comm=False)}
            )
            self.stage = stage

        def zero_optimization_stage(self) -> int:
            return self.stage

        def gradient_accumulation_steps(self) -> int:
            return 4

        def train_micro_batch_size_per_gpu(self) -> int:
            return 2

        def gradient_clipping(self) -> float:
            return 1.0

        def bfloat16_enabled(self) -> bool:
            return torch.cuda.is_available()

        def fp16_enabled(self) -> bool:
            return False

    config = load("data.global_batch=8", "data.micro_batch=2")
    check_engine(Engine(2), config)
    overlapping = load("data.global_batch=8", "data.micro_batch=2", "zero.overlap_comm=true")
    with pytest.raises(UserError, match=r"zero\.overlap_comm: it uses False instead of True"):
        check_engine(Engine(2), overlapping)
    with pytest.raises(UserError, match="uses 1 instead of 2"):
        check_engine(Engine(1), config)
