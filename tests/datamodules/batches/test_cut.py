"""Ranks that share windows: their parts, side by side, are the windows of ranks that do not."""

from typing import Any

import pytest
import torch

from megabase.datamodules.batches.collate import Batch
from megabase.datamodules.datamodule import SequenceDataModule
from megabase.datamodules.index.shard_index import ShardIndex
from tests.datamodules.loading import LENGTH, module, take

AUGMENTED = {"shift": 30, "reverse_complement": 0.5, "softmask_weight": 0.25}
WAYS: dict[str, dict[str, Any]] = {
    "causal": AUGMENTED,
    "masked": {**AUGMENTED, "objective": "masked"},
    "packed": {"pack": True, "reverse_complement": 0.5},
}


def joined(parts: list[Batch]) -> list[torch.Tensor]:
    """Tokens, labels and weights of the whole windows."""
    columns = zip(*(part.widened() for part in parts), strict=True)
    return [torch.cat(tensors, dim=1) for tensors in columns if tensors[0] is not None]


def modules(index: ShardIndex, **settings: Any) -> list[SequenceDataModule]:
    """Of four ranks, two of which share each window."""
    return [module(index, rank, 4, sequence_ranks=2, **settings) for rank in range(4)]


@pytest.mark.parametrize("way", WAYS)
def test_parts_are_the_window(lambda_shards: ShardIndex, way: str) -> None:
    settings = {"micro_batch": 2, **WAYS[way]}
    shared = modules(lambda_shards, **settings)
    for rank in range(2):
        whole = module(lambda_shards, rank, 2, **settings)
        pair = shared[2 * rank : 2 * rank + 2]
        assert pair[0].accumulation == whole.accumulation
        for expected, *parts in zip(take(whole, 3), *(take(part, 3) for part in pair), strict=True):
            for part in parts:
                assert part.tokens.shape == (2, LENGTH // 2)
                assert torch.equal(part.samples, expected.samples) and part.targets == expected.targets
            assert all(map(torch.equal, joined(parts), joined([expected])))


def test_held_out_windows_and_recall(lambda_shards: ShardIndex) -> None:
    shared, whole = modules(lambda_shards)[:2], module(lambda_shards, ranks=2)
    for expected, *parts in zip(
        whole.val_dataloader(), *(each.val_dataloader() for each in shared), strict=True
    ):
        assert all(map(torch.equal, joined(parts), joined([expected])))
        assert torch.equal(torch.cat([part.lower for part in parts], dim=1), expected.lower)
    probes = [each.recall_probe(4) for each in (whole, *shared)]
    for batches in zip(*probes, strict=True):
        for expected, *parts in zip(*batches, strict=True):
            assert all(map(torch.equal, joined(parts), joined([expected])))


def test_only_a_part_is_read(lambda_shards: ShardIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the base before it, which is the first token of every part but the first."""
    read: list[int] = []
    original = ShardIndex.read_into

    def count(self: ShardIndex, row: int, start: int, out: Any) -> None:
        read.append(len(out))
        original(self, row, start, out)

    monkeypatch.setattr(ShardIndex, "read_into", count)
    for data, bases in zip(modules(lambda_shards, reverse_complement=0.5), (256, 257) * 2, strict=True):
        read.clear()
        take(data, 2)
        assert set(read) == {bases}
