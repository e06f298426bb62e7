"""From `zero.*`, `optim.clip` and `trainer.precision` to a DeepSpeed configuration.

`passthrough.py` checks what `zero.deepspeed` adds to it. This module does not import DeepSpeed, which takes seconds.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megabase.pipeline.config.schema import CPU, NONE, NVME, RunConfig, ZeroConfig
from megabase.pipeline.errors import UserError
from megabase.pipeline.hardware import precision_of
from megabase.pipeline.zero.reserved import ZERO


@dataclass(frozen=True)
class SavedLayout:
    """How the ranks that wrote a checkpoint laid out its states.

    Attributes:
        ranks: number of processes, the world size.
        stage: ZeRO stage.
        precision: `32`, `bf16` or `16`.
        options: of `layout_options`.
    """

    ranks: int
    stage: int
    precision: str
    options: tuple[Any, ...] = ()


def deepspeed_config(config: RunConfig) -> dict[str, Any]:
    """The DeepSpeed configuration of a run. Lightning's Trainer adds accumulation and clipping."""
    return merged(own_settings(config), config.zero.deepspeed)


def own_settings(config: RunConfig) -> dict[str, Any]:
    """The DeepSpeed configuration of a run, without what `zero.deepspeed` adds."""
    precision = precision_of(config.trainer.precision)
    bucket = config.zero.bucket_mb * 2**20 // (4 if precision == "32" else 2)
    zero: dict[str, Any] = {
        "stage": config.zero.stage,
        "contiguous_gradients": True,
        "overlap_comm": config.zero.overlap_comm,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
    }
    if config.zero.stage == 3:
        # Parameters with fewer elements than the threshold stay gathered: sharding them would cost more than it saves.
        zero |= {"stage3_prefetch_bucket_size": bucket, "stage3_param_persistence_threshold": 10_000}
    offloads = {"offload_optimizer": config.zero.offload, "offload_param": config.zero.offload_parameters}
    for key, device in offloads.items():
        if device != NONE:
            # Host memory that `offload.py` will map from files cannot be pinned.
            zero[key] = {"device": CPU, "pin_memory": device == CPU and torch.cuda.is_available()}
    own = {
        "train_micro_batch_size_per_gpu": config.data.micro_batch,
        ZERO: zero,
        # torch's AdamW with our parameter groups, on every device.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if precision == "bf16":
        own["bf16"] = {"enabled": True}
    if precision == "16":
        # Dynamic loss scaling (loss_scale 0): halved after an overflow, doubled after loss_scale_window good steps.
        own["fp16"] = {"enabled": True, "loss_scale": 0, "initial_scale_power": 16, "loss_scale_window": 1000}
    return own


def merged(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """A new dictionary: `change` merged over `base`, section by section."""
    result = dict(base)
    for key, value in change.items():
        old = base.get(key)
        result[key] = merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


def layout_options(settings: dict[str, Any]) -> tuple[Any, ...]:
    """The settings that decide, in addition to ranks and stage, where in a checkpoint's files a parameter lies.

    If they differ between two runs, DeepSpeed cannot load the checkpoint of one into the other.

    Args:
        settings: all settings of a run, by their dotted keys, as in a manifest.
    """
    keys = ("round_robin_gradients", "sub_group_size")
    return tuple(settings.get(f"zero.deepspeed.{ZERO}.{key}") for key in keys)


def check_engine(engine: Any, config: RunConfig) -> None:
    """Compare the settings that a DeepSpeed engine uses with those of the run.

    Raises:
        UserError: they differ, for example because another version of DeepSpeed reads its configuration differently.
            The message names each difference.
    """
    zero = engine._config.zero_config
    devices = [part.device if part else "none" for part in (zero.offload_optimizer, zero.offload_param)]
    # With nvme, DeepSpeed offloads to host memory as well, which `offload.py` maps from files.
    in_engine = {NONE: NONE, CPU: CPU, NVME: CPU}
    accumulated = engine.gradient_accumulation_steps() * engine.train_micro_batch_size_per_gpu()
    precision = "bf16" if engine.bfloat16_enabled() else "16" if engine.fp16_enabled() else "32"
    # {setting: (the engine's value, the run's value)}.
    values = {
        "zero.stage": (int(engine.zero_optimization_stage()), config.zero.stage),
        "zero.offload": (str(devices[0]), in_engine[config.zero.offload]),
        "zero.offload_parameters": (str(devices[1]), in_engine[config.zero.offload_parameters]),
        "optim.clip": (float(engine.gradient_clipping()), float(config.optim.clip)),
        # DeepSpeed does not know that ranks share windows: to it, each has windows of its own.
        "data.global_batch": (
            accumulated * engine.dp_world_size // config.trainer.sequence_ranks,
            config.data.global_batch,
        ),
        "trainer.precision": (precision, precision_of(config.trainer.precision)),
        "zero.overlap_comm": (bool(zero.overlap_comm), config.zero.overlap_comm),
    }
    differences = [
        f"{key}: it uses {used!r} instead of {expected!r}"
        for key, (used, expected) in values.items()
        if used != expected
    ]
    if differences:
        raise UserError(f"DeepSpeed uses other settings than the run's: {'; '.join(differences)}")


def check_overlap(config: RunConfig, parameters: Iterable[tuple[str, Tensor]]) -> None:
    """Check that `zero.overlap_comm` does not let timing decide what this model computes (`docs/zero.md`).

    In stages 1 and 2 a bucket must hold each parameter: DeepSpeed reduces a larger gradient where the backward pass has
    left it, and may free that memory before the reduction has read it. In stage 3 a parameter must be small enough to
    stay gathered: to gather it after a step is what makes the stream that gathers weights wait for their update.

    Args:
        config: the run.
        parameters: with their names; they may be sharded already.

    Raises:
        UserError: it does.
    """
    if not config.zero.overlap_comm:
        return
    zero = deepspeed_config(config)[ZERO]
    sizes = {name: getattr(parameter, "ds_numel", parameter.numel()) for name, parameter in parameters}
    if config.zero.stage == 3:
        limits = [f"stage3_{of}_persistence_threshold" for of in ("param", "model")]
        if all(size > min(zero.get(key, size) for key in limits) for size in sizes.values()):
            raise UserError(
                f"zero.overlap_comm=true: every parameter has more elements than {ZERO}.{limits[0]}={zero[limits[0]]}"
                f" or {limits[1]}: leave them at their defaults, or set zero.overlap_comm=false"
            )
        return
    bucket = zero["reduce_bucket_size"]
    for name, size in sizes.items():
        if size > bucket:
            needed = -(-size * config.zero.bucket_mb // bucket)
            raise UserError(
                f"zero.overlap_comm=true: {name} has {size:,} elements, more than a bucket of"
                f" zero.bucket_mb={config.zero.bucket_mb}: set zero.bucket_mb={needed}, or zero.overlap_comm=false"
            )


def check_nvme_path(zero: ZeroConfig) -> None:
    """Make the directory `zero.nvme_path` and check that files can be written there.

    Raises:
        UserError: they cannot.
    """
    assert zero.nvme_path
    path = Path(zero.nvme_path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(
            f"zero.nvme_path={zero.nvme_path} cannot be written ({error.strerror}): name a directory on a disk of"
            " every node"
        ) from None
