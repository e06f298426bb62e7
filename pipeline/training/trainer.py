"""Lightning's Trainer, reduced to the loop over batches: the callback logs, evaluates, saves and stops."""

from __future__ import annotations

import logging
import re
import warnings

import pytorch_lightning as pl

from megabase.datamodules.config import accumulation
from megabase.pipeline.config.schema import RunConfig
from megabase.pipeline.hardware import precision_of
from megabase.pipeline.ranks.environment import visible_gpus
from megabase.pipeline.ranks.groups import Groups
from megabase.pipeline.zero.settings import SavedLayout
from megabase.pipeline.zero.strategy import LIGHTNING_PRECISION, ZeroStrategy, quiet


def make_trainer(
    config: RunConfig, devices: int, groups: Groups, callbacks: list[pl.Callback], saved: SavedLayout | None
) -> pl.Trainer:
    """The Trainer of a run.

    Args:
        config: of the run.
        devices: ranks on each node.
        groups: of ranks.
        callbacks: the last one ends the run, and does what the Trainer is configured not to do.
        saved: layout of the checkpoint to load; None for a fresh start.
    """
    silence_libraries()
    batches = accumulation(config.data.global_batch, config.data.micro_batch, groups.data_size)
    # Lightning counts the devices that a process sees: with one for each task, every task is a node to it.
    seen = min(devices, visible_gpus() or devices)
    trainer = pl.Trainer(
        accelerator="auto",
        devices=seen,
        num_nodes=config.trainer.nodes * devices // seen,
        strategy=ZeroStrategy(config, saved),
        precision=LIGHTNING_PRECISION[precision_of(config.trainer.precision)],  # type: ignore[arg-type]
        # The callback ends the run, after the last evaluation.
        max_steps=-1,
        max_epochs=-1,
        accumulate_grad_batches=batches,
        gradient_clip_val=config.optim.clip or None,
        callbacks=callbacks,
        default_root_dir=config.directory,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        use_distributed_sampler=False,
    )
    return quiet(trainer)


def silence_libraries() -> None:
    """Keep tips, notices and deprecation warnings of libraries out of the run's log.

    Call it after these libraries are imported: the import sets the levels.
    """
    for name in ("pytorch_lightning", "lightning_fabric", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for module in ("pytorch_lightning", "lightning_fabric", "torch.distributed", "deepspeed"):
        warnings.filterwarnings("ignore", module=re.escape(module))
