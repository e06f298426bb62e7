"""Helpers: a data module on one of several ranks, and what its batches hold."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megabase.datamodules.batches.collate import Batch
from megabase.datamodules.config import DataConfig
from megabase.datamodules.datamodule import SequenceDataModule
from megabase.datamodules.index.shard_index import ShardIndex
from megabase.datamodules.order.training_order import Order

LENGTH, GLOBAL_BATCH, SEED = 512, 8, 11


def module(
    index: ShardIndex,
    rank: int = 0,
    ranks: int = 1,
    step: int = 0,
    sequence_ranks: int = 1,
    **settings: Any,
) -> SequenceDataModule:
    """A data module on one of several ranks, set up for training."""
    config = DataConfig(str(index.directory), **{"length": LENGTH, "global_batch": GLOBAL_BATCH, **settings})
    data = SequenceDataModule(config, SEED, sequence_ranks)
    data.trainer = SimpleNamespace(global_rank=rank, world_size=ranks, global_step=step)  # type: ignore[assignment]
    data.setup("fit")
    return data


def take(data: SequenceDataModule, steps: int) -> list[Batch]:
    batches = iter(data.train_dataloader())
    return [next(batches) for _ in range(steps * data.accumulation)]


def ids_of_step(step: int, windows: int) -> NDArray[np.int64]:
    """Ids of the windows in a global batch of `take`."""
    return Order(SEED, (0, windows)).of_step(step, GLOBAL_BATCH)[0]


def same(one: Batch, two: Batch) -> bool:
    return all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(one, two, strict=True)
    )


def labelled(batch: Batch) -> torch.Tensor:
    """Where a batch has labels: (batch, length) bool."""
    return batch.widened().labels != -100


def interleaved(by_rank: list[list[Batch]]) -> list[Batch]:
    """The micro batches of all ranks, those of a turn beside each other."""
    return [batch for together in zip(*by_rank, strict=True) for batch in together]


def stacked(batches: list[Batch]) -> tuple[torch.Tensor, ...]:
    """tokens, labels, weights if there are any, and samples, row by row."""
    columns = zip(*((*batch.widened(), batch.samples) for batch in batches), strict=True)
    return tuple(torch.cat(tensors) for tensors in columns if tensors[0] is not None)


EVERYTHING: dict[str, Any] = {
    "length": 100,
    "stride": 37,
    "shift": 30,
    "reverse_complement": 0.5,
    "softmask_weight": 0.25,
    "mixture": {"a.fa": 2.0, "b*": 1.0},
    "pack": True,
    "on_error": "skip",
}
