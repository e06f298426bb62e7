"""DeepSpeed's keys that `zero.deepspeed` must not set: a setting of megabase decides them, or they would break
a guarantee or do nothing."""

from __future__ import annotations

ZERO = "zero_optimization"
HPZ = "zero_hpz_partition_size"
# DeepSpeed's keys that a setting of megabase decides, and that setting: `zero.deepspeed` must not set them again.
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
    f"{ZERO}.overlap_comm": "zero.overlap_comm",
    f"{ZERO}.offload_optimizer.device": "zero.offload",
    f"{ZERO}.offload_optimizer.nvme_path": "zero.nvme_path",
    f"{ZERO}.offload_param.device": "zero.offload_parameters",
    f"{ZERO}.offload_param.nvme_path": "zero.nvme_path",
    f"{ZERO}.cpu_offload": "zero.offload",
    f"{ZERO}.cpu_offload_param": "zero.offload_parameters",
    f"{ZERO}.cpu_offload_use_pin_memory": f"zero.deepspeed.{ZERO}.offload_optimizer.pin_memory",
}
_ADAM = "the optimizer is torch's AdamW, which computes the same numbers on every device"
_MASTER = "weights and AdamW's states are kept in fp32"
_CHECKPOINT = "it changes the layout of states in a checkpoint, which megabase could not read then"
_MICS = (
    "DeepSpeed has removed MiCS; to gather weights within a node, set zero.deepspeed.zero_optimization."
    "zero_hpz_partition_size to the number of ranks of a node"
)
_DISK = "megabase offloads to a disk through files that are mapped into host memory, see docs/zero.md"
_MODEL = "megabase does not split models that way"
_DATA = "the windows of a step are a function of run.seed alone"
_NO_EFFECT = "it has no effect in megabase"
# DeepSpeed's keys that would break a guarantee of megabase or do nothing, and why.
REFUSED = {
    "zero_allow_untested_optimizer": _ADAM,
    "zero_force_ds_cpu_optimizer": _ADAM,
    "prescale_gradients": "the loss is scaled for gradients that are averaged over the ranks",
    "gradient_predivide_factor": "the loss is scaled for gradients that are averaged over the ranks",
    "gradient_allreduce_op": "the loss is scaled for gradients that are averaged over the ranks",
    "managed_gradient_accumulation": "steps are counted by DeepSpeed's accumulation",
    "disable_allgather": "every rank needs the updated weights",
    "fp16.auto_cast": "inputs are token numbers, which must stay integers",
    "fp16.fp16_master_weights_and_grads": _MASTER,
    "bf16.bf16_master_weights_and_grads": _MASTER,
    "bf16.bf16_optimizer_states": _MASTER,
    "bf16.check_grad_overflow": "guard.on_bad finds and skips bad steps with it",
    f"{ZERO}.contiguous_gradients": "reductions need contiguous gradients",
    f"{ZERO}.compute_grad_norm": "optim.clip and the journal need the norm",
    f"{ZERO}.elastic_checkpoint": _CHECKPOINT,
    f"{ZERO}.legacy_stage1": _CHECKPOINT,
    f"{ZERO}.load_from_fp32_weights": _CHECKPOINT,
    f"{ZERO}.parameter_alignment": _CHECKPOINT,
    f"{ZERO}.pipeline_loading_checkpoint": _CHECKPOINT,
    f"{ZERO}.mics_shard_size": _MICS,
    f"{ZERO}.mics_hierarchical_params_gather": _MICS,
    f"{ZERO}.zero_quantized_weights": "weights would be rounded in communication",
    f"{ZERO}.zero_quantized_nontrainable_weights": "weights would be rounded in communication",
    f"{ZERO}.zero_quantized_gradients": "gradients would be rounded in communication",
    f"{ZERO}.zeropp_loco_param": "gradients would be rounded in communication",
    f"{ZERO}.zenflow": "updates would depend on timing, and a resumed run would not be exact",
    f"{ZERO}.override_module_apply": "models are built without Module.apply",
    f"{ZERO}.save_muon_momentum_buffer_in_memory": _ADAM,
    f"{ZERO}.stage3_gather_16bit_weights_on_model_save": "`megabase export` writes the full weights",
    f"{ZERO}.stage3_gather_fp16_weights_on_model_save": "`megabase export` writes the full weights",
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
    "progressive_layer_drop": "every step uses all layers of a model",
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
