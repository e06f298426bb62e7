"""From `zero.*`, `optim.clip` and `trainer.precision` to a DeepSpeed configuration.

`zero.deepspeed` goes through to DeepSpeed as it is, after a check. DeepSpeed overlooks a key that it does not know, and
a key that is ours would be set twice; both end here with one line. What DeepSpeed knows is asked of DeepSpeed: it
reads a configuration that notes what it is asked for (`Asked`). So there is no list of ours that would grow old.

DeepSpeed takes seconds to import: only a check of `zero.deepspeed` needs it.
"""

from __future__ import annotations

import difflib
import logging
import os
import tempfile
from collections.abc import Iterator, KeysView
from pathlib import Path
from typing import Any

import torch

from megabase.pipeline.config.keys import flatten
from megabase.pipeline.config.schema import CPU, NONE, NVME, RunConfig, ZeroConfig
from megabase.pipeline.errors import UserError, first_line
from megabase.pipeline.hardware import precision_of

ZERO = "zero_optimization"
# DeepSpeed's keys that settings of ours decide: `zero.deepspeed` does not set them a second time.
OURS = {
    "train_batch_size": "data.global_batch",
    "train_micro_batch_size_per_gpu": "data.micro_batch",
    "gradient_accumulation_steps": "data.global_batch and data.micro_batch",
    "gradient_clipping": "optim.clip",
    "optimizer": "optim.*",
    "scheduler": "optim.lr, optim.min_lr and optim.warmup_steps",
    "fp16.enabled": "trainer.precision=16",
    "bf16.enabled": "trainer.precision=bf16",
    "bfloat16": "trainer.precision=bf16",
    "torch_autocast": "trainer.precision",
    "data_types": "trainer.precision",
    "checkpoint": "checkpoint.*",
    f"{ZERO}.stage": "zero.stage",
    f"{ZERO}.reduce_bucket_size": "zero.bucket_mb",
    f"{ZERO}.allgather_bucket_size": "zero.bucket_mb",
    f"{ZERO}.offload_optimizer.device": "zero.offload",
    f"{ZERO}.offload_optimizer.nvme_path": "zero.nvme_path",
    f"{ZERO}.offload_param.device": "zero.offload_parameters",
    f"{ZERO}.offload_param.nvme_path": "zero.nvme_path",
    f"{ZERO}.cpu_offload": "zero.offload",
    f"{ZERO}.cpu_offload_param": "zero.offload_parameters",
    f"{ZERO}.cpu_offload_use_pin_memory": f"zero.deepspeed.{ZERO}.offload_optimizer.pin_memory",
}
_ADAM = "the optimizer is torch's AdamW, the same numbers on every device"
_MASTER = "weights and AdamW's states are kept in fp32"
_CHECKPOINT = "it lays the states out in a way that a checkpoint could not be read back from"
_DISK = "disks are mapped into host memory, see docs/zero.md"
_MODEL = "models are not split that way here"
_DATA = "which windows a step has is a function of run.seed alone"
_NO_EFFECT = "it has no effect here"
# DeepSpeed's keys that would break a promise of megabase, and which.
REFUSED = {
    "zero_allow_untested_optimizer": _ADAM,
    "zero_force_ds_cpu_optimizer": _ADAM,
    "prescale_gradients": "the loss is made to be averaged over the ranks",
    "gradient_predivide_factor": "the loss is made to be averaged over the ranks",
    "gradient_allreduce_op": "the loss is made to be averaged over the ranks",
    "managed_gradient_accumulation": "steps are counted by DeepSpeed's accumulation",
    "disable_allgather": "every rank needs the updated weights",
    "fp16.auto_cast": "inputs are tokens",
    "fp16.fp16_master_weights_and_grads": _MASTER,
    "bf16.bf16_master_weights_and_grads": _MASTER,
    "bf16.bf16_optimizer_states": _MASTER,
    "bf16.check_grad_overflow": "bad steps are found and skipped by it (guard.on_bad)",
    f"{ZERO}.overlap_comm": "reductions would follow timing, and a resumed run would not be exact",
    f"{ZERO}.contiguous_gradients": "reductions need it",
    f"{ZERO}.compute_grad_norm": "optim.clip and the journal need it",
    f"{ZERO}.elastic_checkpoint": _CHECKPOINT,
    f"{ZERO}.legacy_stage1": _CHECKPOINT,
    f"{ZERO}.load_from_fp32_weights": _CHECKPOINT,
    f"{ZERO}.parameter_alignment": _CHECKPOINT,
    f"{ZERO}.pipeline_loading_checkpoint": _CHECKPOINT,
    f"{ZERO}.mics_shard_size": _CHECKPOINT,
    f"{ZERO}.mics_hierarchical_params_gather": _CHECKPOINT,
    f"{ZERO}.zero_hpz_partition_size": _CHECKPOINT,
    f"{ZERO}.zero_quantized_weights": "weights would be rounded on their way",
    f"{ZERO}.zero_quantized_nontrainable_weights": "weights would be rounded on their way",
    f"{ZERO}.zero_quantized_gradients": "gradients would be rounded on their way",
    f"{ZERO}.zeropp_loco_param": "gradients would be rounded on their way",
    f"{ZERO}.zenflow": "updates would follow timing, and a resumed run would not be exact",
    f"{ZERO}.override_module_apply": "models are built without Module.apply",
    f"{ZERO}.save_muon_momentum_buffer_in_memory": _ADAM,
    f"{ZERO}.stage3_gather_16bit_weights_on_model_save": "`megabase export` writes whole weights",
    f"{ZERO}.stage3_gather_fp16_weights_on_model_save": "`megabase export` writes whole weights",
    f"{ZERO}.offload_optimizer.ratio": _ADAM,
    f"{ZERO}.offload_optimizer.super_offload": _ADAM,
    f"{ZERO}.offload_optimizer.buffer_count": _DISK,
    f"{ZERO}.offload_optimizer.fast_init": _DISK,
    f"{ZERO}.offload_optimizer.pipeline_read": _DISK,
    f"{ZERO}.offload_optimizer.pipeline_write": _DISK,
    f"{ZERO}.offload_param.buffer_count": _DISK,
    f"{ZERO}.offload_param.buffer_size": _DISK,
    f"{ZERO}.offload_param.max_in_cpu": _DISK,
    "aio": _DISK,
    f"{ZERO}.offload_optimizer.cpuadam_cores_perc": _ADAM,
    "tensor_parallel": _MODEL,
    "sequence_parallel_size": _MODEL,
    "seq_parallel_communication_data_type": _MODEL,
    "expert_parallel": _MODEL,
    "use_data_before_expert_parallelism": _MODEL,
    "pipeline": _MODEL,
    "progressive_layer_drop": "models have all their layers at every step",
    "hybrid_engine": _NO_EFFECT,
    "autotuning": _NO_EFFECT,
    "compile": _NO_EFFECT,
    "weight_quantization": _NO_EFFECT,
    "vocabulary_size": _NO_EFFECT,
    "datastates_ckpt": "checkpoint.background writes in the background",
    "activation_checkpointing": "a reversible model keeps no activations",
    "data_efficiency": _DATA,
    "curriculum_learning": _DATA,
    "dataloader_drop_last": _DATA,
}


def deepspeed_config(config: RunConfig) -> dict[str, Any]:
    """The DeepSpeed configuration of a run. Accumulation and clipping are filled in by Lightning's Trainer."""
    return _merged(_own(config), config.zero.deepspeed)


def check(config: RunConfig) -> None:
    """Find out what is wrong with `zero.*` on this machine before anything is started.

    Raises:
        UserError: a key of `zero.deepspeed` is unknown, ours, refused or without effect, or its value is none that
            DeepSpeed takes; `zero.nvme_path` cannot be written.
    """
    zero = config.zero
    if zero.on_disk:
        _check_nvme(zero)
    if zero.deepspeed:
        _check_passthrough(config)


def layout(flat: dict[str, Any]) -> tuple[Any, ...]:
    """What decides, beside ranks and stage, where in the files of a checkpoint a parameter lies.

    Args:
        flat: a flattened config, as manifests hold it. Where the layouts of two differ, DeepSpeed cannot load one's
            checkpoint into the other.
    """
    keys = ("round_robin_gradients", "sub_group_size")
    return tuple(flat.get(f"zero.deepspeed.{ZERO}.{key}") for key in keys)


def verify(engine: Any, config: RunConfig) -> None:
    """Compare what a DeepSpeed engine took with what was meant.

    Raises:
        UserError: they differ, after a change of DeepSpeed perhaps; the message shows each difference.
    """
    zero = engine._config.zero_config
    devices = [part.device if part else "none" for part in (zero.offload_optimizer, zero.offload_param)]
    host = {NONE: NONE, CPU: CPU, NVME: CPU}
    accumulated = engine.gradient_accumulation_steps() * engine.train_micro_batch_size_per_gpu()
    sixteen = "bf16" if engine.bfloat16_enabled() else "16" if engine.fp16_enabled() else "32"
    took = {
        "zero.stage": (int(engine.zero_optimization_stage()), config.zero.stage),
        "zero.offload": (str(devices[0]), host[config.zero.offload]),
        "zero.offload_parameters": (str(devices[1]), host[config.zero.offload_parameters]),
        "optim.clip": (float(engine.gradient_clipping()), float(config.optim.clip)),
        "data.global_batch": (accumulated * engine.dp_world_size, config.data.global_batch),
        "trainer.precision": (sixteen, precision_of(config.trainer.precision)),
        f"{ZERO}.overlap_comm": (zero.overlap_comm, False),
    }
    wrong = [
        f"{key}: {meant!r} was meant, {taken!r} taken"
        for key, (taken, meant) in took.items()
        if taken != meant
    ]
    if wrong:
        raise UserError(f"DeepSpeed did not take its configuration: {'; '.join(wrong)}")


def _own(config: RunConfig) -> dict[str, Any]:
    """The configuration without what `zero.deepspeed` adds."""
    precision = precision_of(config.trainer.precision)
    bucket = config.zero.bucket_mb * 2**20 // (4 if precision == "32" else 2)
    zero: dict[str, Any] = {
        "stage": config.zero.stage,
        "contiguous_gradients": True,
        # With overlap the order of reduction follows timing; without it, it follows the program: exact resume.
        "overlap_comm": False,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
    }
    if config.zero.stage == 3:
        # Small layers stay whole on every rank; sharding them would cost more than it saves.
        zero |= {"stage3_prefetch_bucket_size": bucket, "stage3_param_persistence_threshold": 10_000}
    offloads = {"offload_optimizer": config.zero.offload, "offload_param": config.zero.offload_parameters}
    for key, device in offloads.items():
        if device != NONE:
            # What is to be mapped from files (`offload.py`) cannot be pinned.
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
        # Dynamic loss scaling (loss_scale 0): halved after an overflow, doubled after so many good steps.
        own["fp16"] = {"enabled": True, "loss_scale": 0, "initial_scale_power": 16, "loss_scale_window": 1000}
    return own


def _merged(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """`change` over `base`, section by section; neither is changed."""
    merged = dict(base)
    for key, value in change.items():
        below = base.get(key)
        merged[key] = _merged(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


class Asked(dict[str, Any]):
    """A configuration that notes which of its keys it was asked for, there or not; so do the sections in it."""

    def __init__(self, content: dict[str, Any]) -> None:
        super().__init__({k: Asked(v) if isinstance(v, dict) else v for k, v in content.items()})
        self.asked: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    # These two lead `**` and `in keys()` past dict's short cuts to the methods above.
    def __iter__(self) -> Iterator[str]:
        return super().__iter__()

    def keys(self) -> KeysView[str]:  # type: ignore[override]
        return KeysView(self)

    def __copy__(self) -> Asked:
        return self


def _check_passthrough(config: RunConfig) -> None:
    given = config.zero.deepspeed
    _quiet_import()
    for key in flatten(given):
        _refuse(key, config)
    own = _own(config)
    for section, value in given.items():
        expected = own.get(section)
        if isinstance(expected, dict) and not isinstance(value, dict):
            raise UserError(f"zero.deepspeed.{section}={value!r}: it holds keys and values")
        _ask_deepspeed(section, _merged(own, {section: value}))


def _refuse(key: str, config: RunConfig) -> None:
    """Raise UserError for a dotted key of DeepSpeed that is not for `zero.deepspeed` to set in this run."""
    place = f"zero.deepspeed.{key}"
    parts = key.split(".")
    if parts[0] == ZERO:
        parts[1:2] = [_aliases().get(part, part) for part in parts[1:2]]
        key = ".".join(parts)
    for start in (".".join(parts[: end + 1]) for end in range(len(parts))):
        if start in OURS:
            raise UserError(f"{place} is decided by our own setting: use {OURS[start]}")
        if start in REFUSED:
            raise UserError(f"{place} cannot be set: {REFUSED[start]}")
    own = _own(config)
    needed = {
        "fp16": ("fp16" in own, "trainer.precision=16"),
        "bf16": ("bf16" in own, "trainer.precision=bf16"),
        f"{ZERO}.offload_optimizer": (config.zero.offload == CPU, "zero.offload=cpu"),
        f"{ZERO}.offload_param": (config.zero.offload_parameters == CPU, "zero.offload_parameters=cpu"),
        f"{ZERO}.sub_group_size": (config.zero.stage == 3, "zero.stage=3"),
        f"{ZERO}.round_robin_gradients": (config.zero.stage in (1, 2), "zero.stage=1 or 2"),
    }
    if parts[-1].startswith("stage3_"):
        needed[key] = (config.zero.stage == 3, "zero.stage=3")
    for start, (there, setting) in needed.items():
        if not there and (key == start or key.startswith(f"{start}.")):
            raise UserError(f"{place} has an effect only with {setting}: set that, or leave it out")


def _aliases() -> dict[str, str]:
    """Second names that DeepSpeed takes for keys of its ZeRO section, and the first ones."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    fields = DeepSpeedZeroConfig.model_fields.items()
    return {name: field.alias for name, field in fields if field.alias and field.alias != name}


def _quiet_import() -> None:
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it fell back to it
    import deepspeed

    deepspeed.utils.logging.logger.setLevel(logging.ERROR)


def _ask_deepspeed(section: str, whole: dict[str, Any]) -> None:
    """Raise UserError unless DeepSpeed takes configuration `whole` and looks at all of its `section`."""
    from deepspeed.runtime.config import DeepSpeedConfig
    from pydantic import ValidationError

    place = f"zero.deepspeed.{section}"
    asked = Asked(whole)
    try:
        DeepSpeedConfig(asked)
    except ValidationError as error:
        first = error.errors()[0]
        # Some of DeepSpeed's models begin one level higher, with the name of the section.
        path = first["loc"][first["loc"][:1] == (section,) :]
        key = ".".join([place, *map(str, path)])
        if first["type"] == "extra_forbidden":
            raise _unknown(key, _fields(error.title, first["loc"][:-1])) from None
        value = "" if isinstance(first["input"], dict) else f"={first['input']!r}"
        raise UserError(f"{key}{value}: {first['msg'].removeprefix('Value error, ')}") from None
    except (
        Exception
    ) as error:  # DeepSpeed asserts, raises its own and Python's errors, with words for the user
        raise UserError(f"{place}: {first_line(error)}") from None
    if section not in asked.asked:
        raise _unknown(place, asked.asked)
    value = dict.__getitem__(asked, section)
    # A section that no one asked for a key went to pydantic as a whole, which has judged its keys above.
    unread = sorted(set(dict.keys(value)) - value.asked) if isinstance(value, Asked) and value.asked else []
    if unread:
        raise _unknown(f"{place}.{unread[0]}", value.asked)


def _unknown(key: str, known: set[str]) -> UserError:
    """The error for a key that DeepSpeed does not know; `known` are those that it does, in the same section."""
    name = key.rpartition(".")[2]
    close = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.4)
    hint = f"did you mean {close[0]!r}?" if close else "see https://www.deepspeed.ai/docs/config-json"
    return UserError(f"{key}: DeepSpeed has no such key; {hint}")


def _fields(title: str, path: tuple[int | str, ...]) -> set[str]:
    """Keys of the section at `path` in DeepSpeed's model of the name `title`."""
    from deepspeed.runtime.config_utils import DeepSpeedConfigModel
    from pydantic import BaseModel

    waiting: list[type[BaseModel]] = [DeepSpeedConfigModel]
    known = {}
    while waiting:
        model = waiting.pop()
        known[model.__name__] = model
        waiting += model.__subclasses__()
    found: Any = known.get(title)
    for part in path:
        kinds = [found.model_fields[str(part)].annotation] if found and part in found.model_fields else []
        kinds += [kind for outer in kinds for kind in getattr(outer, "__args__", ())]
        models = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        found = models[0] if models else None
    return {field.alias or name for name, field in found.model_fields.items()} if found else set()


def _check_nvme(zero: ZeroConfig) -> None:
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
