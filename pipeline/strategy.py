"""DeepSpeed ZeRO under Lightning, on GPUs with NCCL and on CPUs with gloo: one strategy, the same code.

Lightning's DeepSpeedStrategy takes CUDA devices only; the three places that refuse a CPU are opened here. Two
more of its habits are corrected: the loss of an accumulated step is divided by the number of micro batches once
(Lightning and DeepSpeed would each do it), and nothing in it listens to signals or synchronises the device
between steps (`quiet` below): stopping is agreed in `preemption.py`.
"""

from __future__ import annotations

import argparse
import logging
import os
from datetime import timedelta
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns, on import, that it fell back to it

import deepspeed
from lightning_fabric.plugins.environments import TorchElasticEnvironment
from pytorch_lightning.strategies import DeepSpeedStrategy
from pytorch_lightning.trainer.connectors.signal_connector import _SignalConnector
from torch.nn import Module
from torch.optim import Optimizer

from pipeline.config import RunConfig
from pipeline.hardware import precision_of

LIGHTNING_PRECISION = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}

# Collectives may wait this long for the slowest rank: a checkpoint on a slow file system, a cold data cache.
COLLECTIVE_TIMEOUT = timedelta(minutes=30)


class ZeroStrategy(DeepSpeedStrategy):
    """`zero.*` and `optim.clip` of a RunConfig as a Lightning strategy.

    Expects a process group that already exists (see `distributed.py`) and the torchrun variables RANK, LOCAL_RANK,
    WORLD_SIZE, MASTER_ADDR, MASTER_PORT in the environment.
    """

    def __init__(self, config: RunConfig) -> None:
        super().__init__(
            config=deepspeed_config(config),
            cluster_environment=TorchElasticEnvironment(),
            process_group_backend="nccl" if torch.cuda.is_available() else "gloo",
            timeout=COLLECTIVE_TIMEOUT,
        )

    def setup_environment(self) -> None:
        # DDPStrategy's: DeepSpeedStrategy's adds nothing but the refusal of CPUs.
        super(DeepSpeedStrategy, self).setup_environment()

    def setup_distributed(self) -> None:
        self.set_world_ranks()
        start_deepspeed()

    def _setup_model_and_optimizer(
        self, model: Module, optimizer: Optimizer | None, lr_scheduler: Any = None
    ) -> tuple[deepspeed.DeepSpeedEngine, Optimizer]:
        index = self.root_device.index
        engine, zero_optimizer, _, _ = deepspeed.initialize(
            args=argparse.Namespace(device_rank=self.local_rank if index is None else index),
            config=self.config,
            model=model,
            model_parameters=[p for p in model.parameters() if p.requires_grad],
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            dist_init_required=False,
        )
        return engine, zero_optimizer

    def backward(
        self, closure_loss: torch.Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        # Lightning has divided the loss by the micro batches of the step already.
        return super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)

    def barrier(self, name: str | None = None) -> None:
        """Wait for every rank: on CPUs without a device id, which gloo does not take."""
        if self.root_device.type == "cpu":
            if dist.is_initialized():
                dist.barrier()
        else:
            super().barrier(name)


def start_deepspeed() -> None:
    """Tell DeepSpeed of the process group that is there (`distributed.start`)."""
    if not torch.cuda.is_available():
        # DeepSpeed would compile a shared-memory all-reduce now: a minute of start-up and a compiler on every
        # node, for what gloo does well enough.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logging.logger.setLevel(logging.ERROR)
    deepspeed.init_distributed(auto_mpi_discovery=False, timeout=COLLECTIVE_TIMEOUT)


def deepspeed_config(config: RunConfig) -> dict[str, Any]:
    """The DeepSpeed configuration of a run. Accumulation and clipping are filled in by Lightning's Trainer."""
    bytes_each = 4 if precision_of(config.trainer.precision) == "32" else 2
    bucket = config.zero.bucket_mb * 2**20 // bytes_each
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
    if config.zero.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        if config.zero.stage == 3:
            zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_micro_batch_size_per_gpu": config.data.micro_batch,
        "zero_optimization": zero,
        # torch's AdamW with our parameter groups, on every device.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def quiet(trainer: pl.Trainer) -> pl.Trainer:
    """Take out of `trainer` what handles signals and what synchronises the ranks before every batch.

    Lightning's handlers checkpoint and communicate inside the signal frame, each rank at its own step, and its
    epoch loop reads a broadcast flag back from the device for each batch. `preemption.py` does this job without.
    """

    class NoSignals(_SignalConnector):
        def register_signal_handlers(self) -> None:
            self.received_sigterm = False

    trainer._signal_connector = NoSignals(trainer)
    loop = trainer.fit_loop.epoch_loop
    if hasattr(loop, "_broadcast_sigterm_tensor"):
        loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
    return trainer
