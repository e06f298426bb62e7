"""Every private name of DeepSpeed, Lightning and torch that this package uses.

A private name begins with an underscore, or lies in an internal module, or is an attribute that no documentation
mentions. A new version may rename it without notice. tests/pipeline/zero/test_private_names.py looks each of them up
in the installed versions and fails with the name that is gone. It also fails if this package uses a private name that
is not listed here.
"""

from __future__ import annotations

from dataclasses import dataclass

_STAGE_3 = "deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3"
_STAGE_1_2 = "deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer"
_PARTITION = "deepspeed.runtime.zero.partition_parameters"
_ENGINE = "deepspeed.runtime.engine.DeepSpeedEngine"
_TRAINER = "pytorch_lightning.trainer.trainer.Trainer"
_SIGNALS = "pytorch_lightning.trainer.connectors.signal_connector"
_C10D = "torch.distributed.distributed_c10d"


@dataclass(frozen=True)
class PrivateName:
    """A name that a library may change without notice.

    Attributes:
        owner: the module or class that defines or uses it, dotted.
        name: the name.
        reason: what this package needs it for.
    """

    owner: str
    name: str
    reason: str


PRIVATE_NAMES = tuple(
    PrivateName(*row)
    for row in (
        # adamw.py, checkpoint_engine.py: names by which the engine finds our optimizer's results and our storage.
        (_ENGINE, "overflow", "the engine reads this of a plain optimizer: whether it dropped the update"),
        (
            _ENGINE,
            "_global_grad_norm",
            "the engine reads this of a plain optimizer: its gradient norm",
        ),
        (
            _ENGINE,
            "basic_optimizer",
            "the optimizer of ours that it steps: its states are those of this rank's shard",
        ),
        (_ENGINE, "checkpoint_engine", "replaced by ours, which hashes files and writes in the background"),
        (
            "deepspeed.runtime.checkpoint_engine.checkpoint_engine",
            "CheckpointEngine",
            "base class of our reader and writer of files",
        ),
        (
            "deepspeed.runtime.checkpoint_engine.checkpoint_engine",
            "CheckpointCommitInfo",
            "argument with which the engine calls a CheckpointEngine",
        ),
        # checkpoint_engine.py: classes of objects in DeepSpeed's files, which `weights_only` must accept.
        ("deepspeed.utils.tensor_fragment", "fragment_address", "object in DeepSpeed's files"),
        ("deepspeed.runtime.fp16.loss_scaler", "LossScaler", "object in DeepSpeed's files"),
        ("deepspeed.runtime.fp16.loss_scaler", "DynamicLossScaler", "object in DeepSpeed's files"),
        ("deepspeed.runtime.zero.config", "ZeroStageEnum", "object in DeepSpeed's files"),
        # construction.py, parameters.py: parameters under stage 3.
        (_PARTITION, "DeepSpeedTensorOverride", "new tensors keep fp32 while a model is built"),
        (f"{_PARTITION}.Init", "tensor_overrides", "takes DeepSpeedTensorOverride"),
        (f"{_PARTITION}.Init", "_post_init_method", "casts a layer's weights when its __init__ is done"),
        (f"{_PARTITION}.Init", "zero_param_parallel_group", "takes the groups of hpZ, if they exist already"),
        ("deepspeed.utils", "set_z3_leaf_modules", "documented: parameters that are gathered together"),
        ("deepspeed.utils", "groups", "module of the next name"),
        ("deepspeed.utils.groups", "_get_zero_param_intra_parallel_group", "the groups of hpZ"),
        (_PARTITION, "ds_id", "marks a parameter that is sharded already"),
        (_PARTITION, "ds_shape", "full shape of a sharded parameter"),
        (_PARTITION, "ds_numel", "full size of a sharded parameter"),
        (_PARTITION, "ds_tensor", "this rank's part of a parameter"),
        (_PARTITION, "ds_process_group", "the ranks that have the parts of a parameter"),
        # offload.py, reshard.py: where the engine and its optimizers keep states.
        (_STAGE_3, "fp32_partitioned_groups_flat", "fp32 weights of each sub-group"),
        (_STAGE_3, "fp16_partitioned_groups_flat", "weights that forward computes with, of each sub-group"),
        (_STAGE_3, "fp16_groups", "parameters of each sub-group"),
        (_STAGE_3, "param_groups_fp16_flat_cpu_memory", "host memory that mapped files replace"),
        (
            _STAGE_3,
            "_unflatten_partitioned_parameters",
            "makes parameters views of their vector in the mapped file",
        ),
        (
            _STAGE_3,
            "_reassign_or_swap_out_partitioned_parameters",
            "makes the forward pass use weights that were loaded",
        ),
        (_STAGE_1_2, "bit16_groups", "parameters of each group"),
        (_STAGE_1_2, "single_partition_of_fp32_groups", "this rank's part of a group's fp32 weights"),
        (_STAGE_3, "checkpoint_event_prologue", "must run before states are loaded"),
        (_STAGE_3, "checkpoint_event_epilogue", "must run after states are loaded"),
        (
            "deepspeed.utils.mixed_precision_linkage",
            "_hp_mapping",
            "which elements of a parameter a rank keeps",
        ),
        (
            "deepspeed.utils.tensor_fragment",
            "lp_fragment_address",
            "where they begin in the parameter",
        ),
        (
            "deepspeed.utils.tensor_fragment",
            "hp_fragment_address",
            "where they begin in the rank's vector",
        ),
        (
            _ENGINE,
            "_optimizer_has_ckpt_event_prologue",
            "whether checkpoint_event_prologue and _epilogue exist",
        ),
        (_ENGINE, "param_names", "names of parameters, the same as in checkpoints"),
        (_ENGINE, "global_samples", "counter that a checkpoint restores"),
        (_ENGINE, "global_steps", "counter that a checkpoint restores"),
        (_ENGINE, "skipped_steps", "counter that a checkpoint restores"),
        # passthrough.py, settings.py: how DeepSpeed reads its configuration.
        (
            "deepspeed.runtime.config",
            "DeepSpeedConfig",
            "reads a RecordingDict, which shows the keys that it knows",
        ),
        (
            "deepspeed.runtime.config_utils",
            "DeepSpeedConfigModel",
            "base class of all sections; their fields are the keys",
        ),
        ("deepspeed.runtime.zero.config", "DeepSpeedZeroConfig", "its fields have both names of a key"),
        (_ENGINE, "_config", "the settings that an engine uses"),
        (_ENGINE, "zero_config", "the ZeRO section of these settings"),
        # strategy.py.
        (
            _ENGINE,
            "_copy_recovery_script",
            "replaced by nothing: rank 0 would copy a script",
        ),
        (
            "deepspeed.runtime.fp16.loss_scaler",
            "raise_error_at_min_scale",
            "set to False: an overflow at the least loss scale skips the step instead of raising",
        ),
        (
            "deepspeed.ops",
            "__compatible_ops__",
            "changed to keep DeepSpeed from compiling an all-reduce for CPUs",
        ),
        ("deepspeed.utils.logging", "logger", "its level is raised to errors"),
        (
            "pytorch_lightning.strategies.deepspeed.DeepSpeedStrategy",
            "_init_config_if_needed",
            "the configuration must be complete before a model is built",
        ),
        (
            "pytorch_lightning.strategies.deepspeed.DeepSpeedStrategy",
            "_setup_model_and_optimizer",
            "overridden: makes the engine, then checks and changes it",
        ),
        (_SIGNALS, "_SignalConnector", "base class of one that handles no signals"),
        (f"{_SIGNALS}._SignalConnector", "register_signal_handlers", "overridden by one that does nothing"),
        (f"{_SIGNALS}._SignalConnector", "received_sigterm", "Lightning's loops read it"),
        (_TRAINER, "_signal_connector", "replaced by one that handles no signals"),
        (
            "pytorch_lightning.loops.training_epoch_loop._TrainingEpochLoop",
            "_broadcast_sigterm_tensor",
            "replaced by nothing: it would synchronise the ranks before every batch",
        ),
        (
            "pytorch_lightning.loops.fit_loop._FitLoop",
            "epoch_loop",
            "in a checkpoint, its `batch_progress` counts micro batches",
        ),
        # timeouts.py.
        (_C10D, "_world", "lists every process group"),
        (f"{_C10D}._World", "pg_map", "its keys are the process groups"),
        (_C10D, "_set_pg_timeout", "changes the timeout of an existing group"),
    )
)
