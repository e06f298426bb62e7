"""DeepSpeed ZeRO under Lightning, on GPUs with NCCL and on CPUs with gloo: one strategy, the same code.

Lightning's DeepSpeedStrategy accepts CUDA devices only; its methods that refuse a CPU are overridden here. Two more
things are changed. Only Lightning divides the loss of a micro batch by the number of micro batches of a step; DeepSpeed
would divide it again. And `quiet` removes Lightning's handling of signals, which synchronises the device before each
batch: `ranks/agreement.py` makes the ranks stop together.
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
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # otherwise DeepSpeed warns on import that it uses the CPU

import deepspeed
from lightning_fabric.plugins.environments import TorchElasticEnvironment
from pytorch_lightning.strategies import DeepSpeedStrategy
from pytorch_lightning.trainer.connectors.signal_connector import _SignalConnector
from torch.nn import Module
from torch.optim import Optimizer

from megabase.pipeline.config.keys import dotted
from megabase.pipeline.config.schema import RunConfig
from megabase.pipeline.hardware import precision_of
from megabase.pipeline.ranks.rendezvous import STARTING_TIMEOUT
from megabase.pipeline.zero.checkpoint_engine import DIRECTORY, Storage
from megabase.pipeline.zero.construction import Sharded
from megabase.pipeline.zero.offload import map_from_files
from megabase.pipeline.zero.reshard import reshard
from megabase.pipeline.zero.settings import (
    SavedLayout,
    check_engine,
    check_overlap,
    deepspeed_config,
    layout_options,
)
from megabase.pipeline.zero.states import Shards
from megabase.pipeline.zero.updates import update_ratio

LIGHTNING_PRECISION = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}


class ZeroStrategy(DeepSpeedStrategy):
    """`zero.*` and `optim.clip` of a run as a Lightning strategy.

    Requires a process group (`rendezvous.start`) and the torchrun variables RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR
    and MASTER_PORT in the environment.

    Args:
        config: the run.
        saved: layout of the checkpoint that the Trainer resumes from; None if it does not resume.

    Attributes:
        storage: writes and reads this rank's checkpoint files.
    """

    def __init__(self, config: RunConfig, saved: SavedLayout | None = None) -> None:
        super().__init__(
            config=deepspeed_config(config),
            cluster_environment=TorchElasticEnvironment(),
            process_group_backend="nccl" if torch.cuda.is_available() else "gloo",
            timeout=STARTING_TIMEOUT,
        )
        self.run_config = config
        self.storage = Storage(config.checkpoint.background)
        self._saved = saved

    def setup_environment(self) -> None:
        # Calls DDPStrategy's method: DeepSpeedStrategy's does the same, but refuses CPUs.
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
        check_overlap(self.run_config, model.named_parameters())
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
        check_engine(engine, self.run_config)
        if self.run_config.zero.on_disk:
            map_from_files(engine, self.run_config.zero)
        engine.checkpoint_engine = self.storage
        skip_steps_at_least_scale(engine)
        # DeepSpeed would have rank 0 copy its conversion script while the others wait; `megabase export` replaces it.
        engine._copy_recovery_script = lambda _: None
        return engine, zero_optimizer

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None
    ) -> None:
        """Write this rank's files of a checkpoint; `storage.result` waits for them and returns errors."""
        engines_own = ("state_dict", "optimizer_states")
        client = {key: value for key, value in checkpoint.items() if key not in engines_own}
        self.deepspeed_engine.save_checkpoint(
            str(filepath), tag=DIRECTORY, client_state=client, save_latest=False
        )

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Load a checkpoint of any number of ranks and any stage; returns Lightning's part of it."""
        path, saved = Path(checkpoint_path), self._saved
        assert saved is not None, "a ZeroStrategy that loads a checkpoint needs its layout"
        engine, config = self.deepspeed_engine, self.run_config
        own = SavedLayout(
            dist.get_world_size(),
            config.zero.stage,
            precision_of(config.trainer.precision),
            layout_options(dotted(config)),
        )
        # DeepSpeed would replace states that are mapped from files by new ones in memory.
        if saved != own or config.zero.on_disk:
            client = reshard(engine, Shards.open(path, saved))
        else:
            _, client = engine.load_checkpoint(str(path), tag=DIRECTORY, load_lr_scheduler_states=False)
        skip_steps_at_least_scale(engine)  # again, because loading replaces the loss scaler
        _set_batch_counters(client, engine.gradient_accumulation_steps())
        return client

    def backward(
        self, closure_loss: torch.Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        # scale_wrt_gas=False: Lightning has already divided the loss by the number of micro batches of the step.
        return super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)

    def barrier(self, name: str | None = None) -> None:
        """Wait for every rank. On CPUs no device id is passed, because gloo does not accept one."""
        if self.root_device.type == "cpu":
            if dist.is_initialized():
                dist.barrier()
        else:
            super().barrier(name)

    def step_was_applied(self) -> bool:
        """Whether the last optimizer step was made: DeepSpeed drops one with gradients that are not finite."""
        return bool(self.deepspeed_engine.was_step_applied())

    def gradient_norm(self) -> Any:
        """Global gradient norm of the last step, before clipping: a number, a tensor on the device, or None."""
        return self.deepspeed_engine.get_global_grad_norm()

    def update_ratio(self) -> float | None:
        """See `updates.update_ratio`; None before the first update, or with states on a disk. All ranks call it."""
        optimizer = self.deepspeed_engine.basic_optimizer
        if self.run_config.zero.on_disk or not optimizer.state:
            return None
        return update_ratio(optimizer)


def skip_steps_at_least_scale(engine: deepspeed.DeepSpeedEngine) -> None:
    """fp16 under ZeRO: let DeepSpeed skip a step with an overflow at the least loss scale as well.

    DeepSpeed would raise an error that names neither the step nor its windows. `training/guard.py` ends a run with too
    many such steps.
    """
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    if scaler is not None and hasattr(scaler, "raise_error_at_min_scale"):
        scaler.raise_error_at_min_scale = False


def start_deepspeed() -> None:
    """Make DeepSpeed use the process group of `rendezvous.start`."""
    if not torch.cuda.is_available():
        # Otherwise DeepSpeed would now compile an all-reduce over shared memory, which takes a minute and needs a
        # compiler on every node. gloo's is fast enough.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logging.logger.setLevel(logging.ERROR)
    deepspeed.init_distributed(auto_mpi_discovery=False, timeout=STARTING_TIMEOUT)


def quiet(trainer: pl.Trainer) -> pl.Trainer:
    """Remove Lightning's signal handlers and its synchronisation before every batch from a Trainer; returns it.

    Lightning's handlers write checkpoints and communicate inside the signal handler, each rank at its own step. Its
    epoch loop broadcasts a flag for each batch and reads it back from the device. `ranks/stop.py` and
    `ranks/agreement.py` replace both.
    """

    class NoSignals(_SignalConnector):
        def register_signal_handlers(self) -> None:
            self.received_sigterm = False

    trainer._signal_connector = NoSignals(trainer)
    loop = trainer.fit_loop.epoch_loop
    if hasattr(loop, "_broadcast_sigterm_tensor"):
        loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
    return trainer


def _set_batch_counters(client: dict[str, Any], accumulation: int) -> None:
    """Set Lightning's counts of micro batches as if every step so far had used `accumulation` of them."""
    batches = client["global_step"] * accumulation
    for progress in client["loops"]["fit_loop"]["epoch_loop.batch_progress"].values():
        if isinstance(progress, dict):
            # A checkpoint is written while Lightning is still in the last micro batch of its step.
            progress |= {"ready": batches, "started": batches, "processed": batches, "completed": batches - 1}
