"""Keys for DeepSpeed: which are passed on, and the message for each that is refused."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megabase.pipeline.config.keys import flatten
from megabase.pipeline.config.load import load as load_config
from megabase.pipeline.config.schema import RunConfig
from megabase.pipeline.errors import UserError
from megabase.pipeline.zero import passthrough
from megabase.pipeline.zero.reserved import OURS, REFUSED
from megabase.pipeline.zero.settings import deepspeed_config

KEY = "zero.deepspeed"
ZERO = f"{KEY}.zero_optimization"


def load(*settings: str) -> RunConfig:
    return load_config([], ["run.name=x", "data.shards=somewhere", *settings])


def error_of(*settings: str) -> str:
    """The one line that refuses them."""
    with pytest.raises(UserError) as caught:
        passthrough.check(load(*settings))
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["zero.offload=disk"], ["zero.offload='disk'", "none, cpu, nvme"]),
        (["zero.offload_parameters=1"], ["zero.offload_parameters='1'", "none, cpu, nvme"]),
        (["zero.stage=0", "zero.offload=true"], ["zero.offload=cpu", "zero.stage to 1, 2 or 3"]),
        (["zero.stage=2", "zero.offload_parameters=cpu"], ["zero.offload_parameters=cpu", "zero.stage=3"]),
        (["zero.stage=2", "zero.offload=nvme"], ["zero.offload=nvme", "zero.stage=3"]),
        (["zero.stage=3", "zero.offload=nvme"], ["zero.nvme_path"]),
        (
            ["zero.stage=3", "zero.offload=nvme", "zero.nvme_path=/tmp", "checkpoint.background=true"],
            ["checkpoint.background=true", "zero.offload=nvme", "checkpoint.background=false"],
        ),
        (["zero.stage=3", "zero.offload_parameters=nvme"], ["zero.nvme_path"]),
        (
            ["zero.stage=3", "zero.offload_parameters=nvme", "zero.nvme_path=/proc/none"],
            ["zero.nvme_path=/proc/none", "cannot be written"],
        ),
        (["zero.stage=4"], ["zero.stage=4", "0, 1, 2 and 3"]),
    ],
)
def test_offload_that_cannot_work_is_refused(settings: list[str], words: list[str]) -> None:
    message = error_of(*settings)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        (f"{ZERO}.round_robin_gradients=true", {"zero_optimization": {"round_robin_gradients": True}}),
        (
            f"{KEY}={{zero_optimization: {{reduce_scatter: false}}}}",
            {"zero_optimization": {"reduce_scatter": False}},
        ),
        (f"{KEY}.steps_per_print=5", {"steps_per_print": 5}),
        (f"{KEY}.flops_profiler={{enabled: true, profile_step: 3}}", {"flops_profiler": {"profile_step": 3}}),
        (f"{KEY}.comms_logger.verbose=true", {"comms_logger": {"verbose": True}}),
    ],
)
def test_keys_that_deepspeed_knows_pass_beside_ours(setting: str, expected: dict[str, Any]) -> None:
    config = load(setting)
    passthrough.check(config)
    made, plain = deepspeed_config(config), deepspeed_config(load())
    assert flatten(expected).items() <= flatten(made).items()
    assert flatten(plain).items() <= flatten(made).items()


def test_thresholds_of_stage_3_may_be_set() -> None:
    config = load("zero.stage=3", f"{ZERO}.stage3_param_persistence_threshold=0")
    passthrough.check(config)
    made = deepspeed_config(config)["zero_optimization"]
    assert made["stage3_param_persistence_threshold"] == 0 and made["stage"] == 3
    assert deepspeed_config(load("zero.stage=3"))["zero_optimization"] != made


@pytest.mark.parametrize(
    ("setting", "decided_by"),
    [
        (f"{KEY}.train_batch_size=8", "data.global_batch"),
        (f"{KEY}.train_micro_batch_size_per_gpu=8", "data.micro_batch"),
        (f"{KEY}.gradient_accumulation_steps=8", "data.micro_batch"),
        (f"{KEY}.gradient_clipping=1", "optim.clip"),
        (f"{KEY}.optimizer={{type: Adam}}", "optim.*"),
        (f"{KEY}.scheduler.type=WarmupLR", "optim.warmup_steps"),
        (f"{KEY}.bf16.enabled=true", "trainer.precision"),
        (f"{KEY}.checkpoint.load_universal=true", "checkpoint.*"),
        (f"{ZERO}.stage=3", "zero.stage"),
        (f"{ZERO}.reduce_bucket_size=1", "zero.bucket_mb"),
        (f"{ZERO}.overlap_comm=true", "zero.overlap_comm"),
        (f"{ZERO}.offload_optimizer.device=cpu", "zero.offload"),
        (f"{ZERO}.cpu_offload=true", "zero.offload"),
    ],
)
def test_a_key_that_a_setting_decides_names_that_setting(setting: str, decided_by: str) -> None:
    message = error_of(setting)
    assert setting.partition("=")[0] in message and decided_by in message.split(": use ")[1]


def test_every_key_of_our_configuration_is_reserved_or_a_default() -> None:
    config = load("zero.stage=3", "zero.offload=cpu", "zero.offload_parameters=cpu", "trainer.precision=16")
    defaults = {
        "zero_optimization.stage3_prefetch_bucket_size",
        "zero_optimization.stage3_param_persistence_threshold",
        "zero_optimization.offload_optimizer.pin_memory",
        "zero_optimization.offload_param.pin_memory",
        "fp16.loss_scale",
        "fp16.initial_scale_power",
        "fp16.loss_scale_window",
    }
    made = set(flatten(deepspeed_config(config)))
    assert {key for key in made if key not in OURS | REFUSED} == defaults


@pytest.mark.parametrize(
    ("setting", "place", "closest"),
    [
        (f"{KEY}.zero_optimisation.reduce_scatter=true", f"{KEY}.zero_optimisation", "zero_optimization"),
        (f"{KEY}.step_per_print=1", f"{KEY}.step_per_print", "steps_per_print"),
        (f"{ZERO}.round_robin=true", f"{ZERO}.round_robin", "round_robin_gradients"),
        (f"{KEY}.tensorboard.enable=true", f"{KEY}.tensorboard.enable", "enabled"),
        (f"{KEY}.comms_logger.verbos=true", f"{KEY}.comms_logger.verbos", "verbose"),
    ],
)
def test_an_unknown_key_names_the_closest(setting: str, place: str, closest: str) -> None:
    assert error_of(setting) == f"{place}: DeepSpeed has no such key; did you mean {closest!r}?"


def test_an_unknown_key_deep_inside_names_the_closest() -> None:
    message = error_of("zero.offload=cpu", f"{ZERO}.offload_optimizer.buffer_cont=3")
    assert message.startswith(f"{ZERO}.offload_optimizer.buffer_cont: ") and "'buffer_count'" in message


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ([f"{ZERO}.round_robin_gradients=maybe"], [f"{ZERO}.round_robin_gradients='maybe'", "boolean"]),
        ([f"{KEY}.zero_optimization=3"], [f"{KEY}.zero_optimization=3", "keys and values"]),
        ([f"{KEY}.communication_data_type=fp17"], [f"{KEY}.communication_data_type", "fp17"]),
        (
            ["trainer.precision=16", f"{KEY}.fp16.min_loss_scale=0"],
            [f"{KEY}.fp16", "min_loss_scale must be > 0"],
        ),
        ([f"{KEY}.elasticity.enabled=true"], [f"{KEY}.elasticity", "has been removed"]),
    ],
)
def test_a_value_that_deepspeed_does_not_accept_is_named(settings: list[str], words: list[str]) -> None:
    message = error_of(*settings)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        (f"{ZERO}.elastic_checkpoint=true", "checkpoint"),
        (f"{ZERO}.mics_shard_size=2", "removed MiCS"),
        (f"{ZERO}.zero_quantized_gradients=true", "rounded"),
        (f"{KEY}.gradient_allreduce_op=sum", "averaged"),
        (f"{KEY}.prescale_gradients=true", "averaged"),
        (f"{KEY}.gradient_predivide_factor=4", "averaged"),
        (f"{KEY}.tensor_parallel.autotp_size=2", "split"),
        (f"{KEY}.aio.queue_depth=8", "mapped"),
        (f"{ZERO}.offload_param.max_in_cpu=0", "mapped"),
    ],
)
def test_what_breaks_a_guarantee_is_refused_with_the_reason(setting: str, reason: str) -> None:
    message = error_of(setting)
    assert f"{setting.partition('=')[0]} cannot be set: " in message and reason in message


def test_a_second_name_of_a_key_is_refused_like_the_first() -> None:
    name = f"{ZERO}.gather_16bit_weights_on_model_save"
    assert error_of("zero.stage=3", f"{name}=true").startswith(f"{name} cannot be set: ")


@pytest.mark.parametrize(
    ("settings", "needed"),
    [
        ([f"{ZERO}.stage3_prefetch_bucket_size=1"], "zero.stage=3"),
        ([f"{ZERO}.sub_group_size=1000"], "zero.stage=3"),
        ([f"{ZERO}.zero_hpz_partition_size=2"], "zero.stage=3"),
        (["zero.stage=3", f"{ZERO}.round_robin_gradients=true"], "zero.stage=1 or 2"),
        ([f"{KEY}.fp16.initial_scale_power=8"], "trainer.precision=16"),
        ([f"{ZERO}.offload_optimizer.pin_memory=false"], "zero.offload=cpu"),
        (
            [
                *("zero.stage=3", "zero.offload=nvme", "zero.nvme_path=/tmp"),
                f"{ZERO}.offload_optimizer.pin_memory=true",
            ],
            "zero.offload=cpu",
        ),
    ],
)
def test_a_key_without_effect_names_what_it_needs(settings: list[str], needed: str) -> None:
    assert f"has an effect only with {needed}" in error_of(*settings)


def test_groups_with_a_second_copy_of_the_weights_divide_the_ranks() -> None:
    config = load("zero.stage=3", f"{ZERO}.zero_hpz_partition_size=4")
    passthrough.check(config)
    for ranks in (2, 4, 8):
        passthrough.check_ranks(config, ranks)
    with pytest.raises(UserError, match=r"zero_hpz_partition_size=4 does not divide the 6 ranks"):
        passthrough.check_ranks(config, 6)
    passthrough.check_ranks(load(), 6)


@pytest.mark.slow
def test_the_launcher_and_a_check_without_keys_for_deepspeed_do_not_import_it() -> None:
    program = (
        "import sys\n"
        "from megabase.pipeline.config.load import load\n"
        "from megabase.pipeline.zero import passthrough\n"
        "import megabase.pipeline.training.run\n"
        "passthrough.check(load([], ['run.name=x', 'data.shards=y', 'zero.offload=cpu', 'zero.stage=3']))\n"
        "assert 'deepspeed' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_bad_key_ends_train_before_a_rank_is_started(
    tmp_path: Path, lambda_shards: Path, start_job
) -> None:
    settings = [f"data.shards={lambda_shards}", f"run.root={tmp_path}", "run.name=bad", "data.length=512"]
    code, output = start_job("train", *settings, f"{ZERO}.overlap_com=true").wait()
    assert code == 2 and not (tmp_path / "bad").exists()
    assert output.strip().splitlines()[-1].endswith("did you mean 'overlap_comm'?")
    assert "starting" not in output and "Traceback" not in output


def test_fp16_may_be_tuned() -> None:
    passthrough.check(
        load("trainer.precision=16", f"{KEY}.fp16.initial_scale_power=8", f"{KEY}.fp16.hysteresis=1")
    )
