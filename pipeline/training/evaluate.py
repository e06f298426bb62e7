"""Bits per base of a model on a split, beside the Markov models that anything worth training must beat."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist

from megabase.datamodules.datamodule import SequenceDataModule
from megabase.datamodules.files import publish_json
from megabase.datamodules.index.shard_index import ShardIndex
from megabase.datamodules.report import markov
from megabase.pipeline.rundir.journal import Row
from megabase.pipeline.rundir.paths import RunPaths

logger = logging.getLogger(__name__)


def bits(nats: float) -> float:
    """Nats to bits."""
    return nats / math.log(2)


def evaluate(
    trainer: pl.Trainer, data: SequenceDataModule, most: int, stop: Callable[[], bool]
) -> dict[str, float] | None:
    """Loss on the validation split, summed over ranks; every rank calls it.

    None if the split has no window, or if `stop` became true: it is asked between batches, and every rank must
    get the same answer.

    Args:
        most: windows to take, spread evenly over the split; 0 takes all.

    Returns:
        valid_loss (nats per scored base), valid_bits_per_base, valid_bases (number of scored bases): every letter of
        the windows, or with `data.objective` masked the masked ones. valid_skipped: windows that could not be read
        (`data.on_error` skip), if there were any.
    """
    loader = data.some_validation(most)
    if isinstance(loader, list):
        return None
    module = trainer.lightning_module
    strategy = trainer.strategy
    total = torch.zeros(3, dtype=torch.float64, device=strategy.root_device)
    module.eval()
    with torch.no_grad():
        for index, batch in enumerate(loader):
            if stop():
                module.train()
                return None
            moved = strategy.batch_to_device(trainer.precision_plugin.convert_input(batch))
            sums = strategy.validation_step(moved, index)
            assert isinstance(sums, dict)
            total += torch.stack([sums[name].double() for name in ("nats", "bases", "skipped")])
    module.train()
    if dist.is_initialized():
        dist.all_reduce(total)
    nats_sum, bases_sum, skipped = total.tolist()
    loss = nats_sum / bases_sum if bases_sum else math.nan
    result = {"valid_loss": loss, "valid_bits_per_base": bits(loss), "valid_bases": int(bases_sum)}
    return result | ({"valid_skipped": int(skipped)} if skipped else {})


def baselines(directory: Path, index: ShardIndex, skip: bool) -> list[float]:
    """Bits per base of Markov models of order 0, 1, ..., fitted on the training and scored on the validation split.

    Up to order 5, or as far as counting goes with a larger alphabet. Computed once for a run and kept in
    `baselines.json`. skip: leave out bases that cannot be read. For rank 0.
    """
    path = RunPaths(directory).baselines
    identity = index.segments.identity
    with suppress(
        FileNotFoundError, ValueError, KeyError, TypeError
    ):  # torn, or of another version: count again
        kept = json.loads(path.read_bytes())
        if kept["data"] == identity:
            ladder: list[float] = kept["markov_bits_per_base"]
            return ladder
    ladder = list(markov.bits_per_base(index, skip=skip).values())
    try:
        publish_json(path, {"data": identity, "markov_bits_per_base": ladder})
    except OSError as error:  # counted again when they are needed again
        logger.warning("%s cannot be written: %s", path, error.strerror)
    return ladder


def evaluation_row(step: int, result: dict[str, float], ladder: list[float]) -> Row:
    """The journal's row of one evaluation."""
    row: dict[str, Any] = {"step": step, **result}
    return row | {f"markov_{order}_bits_per_base": value for order, value in enumerate(ladder)}
