"""DeepSpeed ZeRO under Lightning, on GPUs with NCCL and on CPUs with gloo: one strategy, the same code.

Lightning's DeepSpeedStrategy takes CUDA devices only; the three places that refuse a CPU are opened here. Two
more of its habits are corrected: the loss of an accumulated step is divided by the number of micro batches once
(Lightning and DeepSpeed would each do it), and nothing in it listens to signals or synchronises the device
between steps (`quiet` below): stopping is agreed between steps, in `callback.py`.
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from pathlib import Path
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

from megabase.pipeline.checkpoint.publish import TAG, read_manifest
from megabase.pipeline.config.keys import dotted
from megabase.pipeline.config.schema import RunConfig
from megabase.pipeline.ranks.rendezvous import STARTING_TIMEOUT
from megabase.pipeline.zero import offload as mapped
from megabase.pipeline.zero.checkpoint_engine import Storage
from megabase.pipeline.zero.construction import Sharded
from megabase.pipeline.zero.reshard import reshard
from megabase.pipeline.zero.settings import deepspeed_config, layout, verify
from megabase.pipeline.zero.states import Shards

LIGHTNING_PRECISION = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}


class ZeroStrategy(DeepSpeedStrategy):
    """`zero.*` and `optim.clip` of a RunConfig as a Lightning strategy.

    Expects a process group that already exists (see `ranks/rendezvous.py`) and the torchrun variables RANK, LOCAL_RANK,
    WORLD_SIZE, MASTER_ADDR, MASTER_PORT in the environment.
    """

    def __init__(self, config: RunConfig) -> None:
        super().__init__(
            config=deepspeed_config(config),
            cluster_environment=TorchElasticEnvironment(),
            process_group_backend="nccl" if torch.cuda.is_available() else "gloo",
            timeout=STARTING_TIMEOUT,
        )
        self.run_config = config
        self.storage = Storage(config.checkpoint.background)

    def setup_environment(self) -> None:
        # DDPStrategy's: DeepSpeedStrategy's adds nothing but the refusal of CPUs.
        super(DeepSpeedStrategy, self).setup_environment()

    def setup_distributed(self) -> None:
        self.set_world_ranks()
        start_deepspeed()

    @contextmanager
    def model_sharded_context(self) -> Generator[None, None, None]:
        """Under stage 3, shard a model while it is built (`construction.py`)."""
        self._init_config_if_needed()
        with Sharded(config_dict_or_path=self.config) if self.zero_stage_3 else nullcontext():
            yield

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
        verify(engine, self.run_config)
        if self.run_config.zero.on_disk:
            mapped.move(engine, self.run_config.zero)
        engine.checkpoint_engine = self.storage
        allow_least_scale(engine)
        # `megabase export` does better than DeepSpeed's script; rank 0 would copy it while the others wait.
        engine._copy_recovery_script = lambda _: None
        return engine, zero_optimizer

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None
    ) -> None:
        """Write this rank's files of a checkpoint; `storage` knows when they are on disk and what went wrong."""
        engines_own = ("state_dict", "optimizer_states")
        client = {key: value for key, value in checkpoint.items() if key not in engines_own}
        self.deepspeed_engine.save_checkpoint(str(filepath), tag=TAG, client_state=client, save_latest=False)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Take over the states of a checkpoint, whatever ranks and stage wrote it; returns Lightning's part."""
        path = Path(checkpoint_path)
        engine = self.deepspeed_engine
        manifest, config = read_manifest(path), self.run_config
        then = manifest.ranks, manifest.stage, layout(manifest.config)
        as_it_was = then == (dist.get_world_size(), config.zero.stage, layout(dotted(config)))
        # DeepSpeed would put new states, in memory, in the place of those that are mapped from files.
        if not as_it_was or config.zero.on_disk:
            client = reshard(engine, Shards.open(path))
        else:
            _, client = engine.load_checkpoint(str(path), tag=TAG, load_lr_scheduler_states=False)
        allow_least_scale(engine)  # a checkpoint brings its own scaler
        _recount(client, engine.gradient_accumulation_steps())
        return client

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


def allow_least_scale(engine: deepspeed.DeepSpeedEngine) -> None:
    """fp16 under ZeRO: leave steps out at the least loss scale, too, as DeepSpeed does without ZeRO.

    It would raise an error that names neither step nor windows; `guard.History` ends such a run.
    """
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    if scaler is not None and hasattr(scaler, "raise_error_at_min_scale"):
        scaler.raise_error_at_min_scale = False


def _recount(client: dict[str, Any], accumulation: int) -> None:
    """Have Lightning continue to count micro batches as if a step had always had `accumulation` of them."""
    batches = client["global_step"] * accumulation
    for progress in client["loops"]["fit_loop"]["epoch_loop.batch_progress"].values():
        if isinstance(progress, dict):
            # A checkpoint is written while Lightning is still in the last micro batch of its step.
            progress |= {"ready": batches, "started": batches, "processed": batches, "completed": batches - 1}


def start_deepspeed() -> None:
    """Tell DeepSpeed of the process group that is there (`rendezvous.start`)."""
    if not torch.cuda.is_available():
        # DeepSpeed would compile a shared-memory all-reduce now: a minute of start-up and a compiler on every
        # node, for what gloo does well enough.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logging.logger.setLevel(logging.ERROR)
    deepspeed.init_distributed(auto_mpi_discovery=False, timeout=STARTING_TIMEOUT)


def quiet(trainer: pl.Trainer) -> pl.Trainer:
    """Take out of `trainer` what handles signals and what synchronises the ranks before every batch.

    Lightning's handlers checkpoint and communicate inside the signal frame, each rank at its own step, and its
    epoch loop reads a broadcast flag back from the device for each batch. `stop.py` and `callback.py` do without.
    """

    class NoSignals(_SignalConnector):
        def register_signal_handlers(self) -> None:
            self.received_sigterm = False

    trainer._signal_connector = NoSignals(trainer)
    loop = trainer.fit_loop.epoch_loop
    if hasattr(loop, "_broadcast_sigterm_tensor"):
        loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
    return trainer
