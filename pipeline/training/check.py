"""The checks of a training that can be made before a process is started or a job is submitted."""

from __future__ import annotations

from contextlib import suppress

import torch

from megabase.datamodules.batches.visits import Windows, training_windows
from megabase.datamodules.config import accumulation
from megabase.datamodules.index.shard_index import ShardIndex
from megabase.datamodules.order.mixture import identity_of
from megabase.models.pretrained import empty
from megabase.pipeline.checkpoint.identity import check_same_run, manifest_of
from megabase.pipeline.checkpoint.manifest import Damaged, list_checkpoints, read_manifest
from megabase.pipeline.config.callbacks import check_modules
from megabase.pipeline.config.schema import RunConfig
from megabase.pipeline.errors import UserError
from megabase.pipeline.plan.request import check_validation
from megabase.pipeline.ranks.environment import is_rank_zero
from megabase.pipeline.rundir.lock import check_writable
from megabase.pipeline.rundir.paths import RunPaths
from megabase.pipeline.tracking.server import Server
from megabase.pipeline.training.initial import check_initial
from megabase.pipeline.zero import passthrough
from megabase.pipeline.zero.settings import check_overlap


def check(config: RunConfig, ranks: int, *, here: bool = True) -> Windows:
    """Check a run against its shards, its run directory and this machine; sets `model.vocab_size`.

    Args:
        config: of the run.
        ranks: that will train it, on all nodes together.
        here: it will run on this machine. False: on others, so what this one has is not looked at.

    Returns:
        The windows to train on, and with them the shards.

    Raises:
        UserError: a setting cannot work, a STOP file holds the run, its directory cannot be written, its newest
            checkpoint belongs to another run, or `run.init_from` does not fit the model.
        DataError: the shards are missing or damaged, or do not fit `data.*`.
        ConfigError: `model.*` cannot work.
    """
    check_settings(config, ranks, here=here)
    index = ShardIndex.open(config.data.shards)
    windows = training_windows(config.data, index)
    check_validation(config, index.segments)
    config.model.vocab_size = index.alphabet.vocab_size
    config.model.validate(config.data.length)
    if config.zero.overlap_comm:
        check_overlap(config, empty(config.model).named_parameters())
    data = identity_of(index.segments, config.data.mixture)
    check_newest_checkpoint(config, ranks, data, index.alphabet.name)
    if config.run.init_from and not list_checkpoints(RunPaths(config.directory).checkpoints):
        check_initial(config, index.alphabet.name)
    return windows


def check_settings(config: RunConfig, ranks: int, *, here: bool = True) -> None:
    """Check a run against its run directory and this machine: what does not depend on its data. See `check`."""
    config.validate()
    if config.tracking.enabled:
        Server.of(config)  # a password in MLFLOW_TRACKING_URI is refused before anything starts
    # One rank decides for all: a STOP file may appear or vanish between the looks of two ranks.
    if is_rank_zero():
        _check_run_directory(config)
    accumulation(config.data.global_batch, config.data.micro_batch, config.data_ranks(ranks))
    passthrough.check(config, here=here)
    passthrough.check_ranks(config, ranks)
    check_modules(config.trainer.callbacks)
    config.trainer.check_device(gpu=torch.cuda.is_available() if here else bool(config.slurm.gpus))


def _check_run_directory(config: RunConfig) -> None:
    stop_file = RunPaths(config.directory).stop
    if stop_file.exists():
        raise UserError(f"{stop_file} stopped this run and keeps it stopped: remove it to go on")
    check_writable(config.directory)


def check_newest_checkpoint(config: RunConfig, ranks: int, data: str, alphabet: str) -> None:
    """Raise UserError if the newest checkpoint is of another model or other data. `choose` handles a damaged one."""
    for path in list_checkpoints(RunPaths(config.directory).checkpoints)[:1]:
        with suppress(Damaged, OSError):
            manifest = read_manifest(path)
            current = manifest_of(config, 0, ranks=ranks, data=data, alphabet=alphabet)
            check_same_run(manifest, current, path)
