"""Our windows and batches as a plain `webdataset.DataPipeline`, for those who compose their own loaders.

WebDataset streams whole tars, splits them by node and worker and shuffles in a buffer, so the order depends on ranks,
workers and timing. `SequenceDataModule` is what training uses: its order is a function of the step.
"""

import itertools
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import webdataset
from isal import isal_zlib
from numpy.typing import NDArray
from webdataset.shardlists import expand_urls

from megabase.datamodules.batches.collate import Batch, Raw, causal_batch, masked_batch, masked_count
from megabase.datamodules.config import CAUSAL, MASKED, DataConfig
from megabase.datamodules.errors import DataError
from megabase.datamodules.index.segments import TRAIN
from megabase.datamodules.index.shard_index import ShardIndex
from megabase.datamodules.order.planning import plan_windows
from megabase.datamodules.order.windows import WindowPlan

_SEQUENCE_MEMBERS = ("seq", "txt")

Window = tuple[int, NDArray[np.uint8]]
"""Window id, and its bases (length,)."""


def webdataset_pipeline(
    shards: str | Path | Sequence[str | Path],
    length: int,
    *,
    batch_size: int = 1,
    split: str = TRAIN,
    min_real: float = 0.5,
    objective: str = CAUSAL,
    mask_rate: float = 0.15,
    shuffle: int = 0,
    seed: int | None = None,
) -> webdataset.DataPipeline:
    """Batches of windows from prepared shards, as a `webdataset.DataPipeline`.

    One pass yields every window of the split once, over all nodes and workers: shards are split by node and by worker,
    as WebDataset does. Give it to `torch.utils.data.DataLoader` or `webdataset.WebLoader` with `batch_size=None`.

    What `SequenceDataModule` has and this does not: a resume at the exact window (this starts its pass again), the same
    batches on any number of ranks and workers, equally many batches on every rank, mixtures, packing, augmentation,
    and remote shards. Segments are compared with their checksums here too. Long because it documents every option.

    Args:
        shards: a directory of shards; or some of its tars, as paths or with braces
            (`"shards/shard-{00000..00009}.tar"`). `index.parquet` must lie beside them.
        length: bases per window.
        batch_size: windows per batch; the last batch of a worker may be smaller.
        split: "train", "valid" or "test".
        min_real: least fraction of letters in a window, 0 to 1.
        objective: "causal" or "masked", see `DataConfig`.
        mask_rate: with "masked", fraction of a window's letters to predict.
        shuffle: windows in the shuffle buffer; the shards' order is shuffled too. 0 keeps the order of the shards.
        seed: of shuffling and masking, 0 or more. None: different every time.

    Returns:
        A pipeline of `Batch`; `batch.widened()` gives int64 tokens, labels and weights. `samples` are the ids that the
        windows have in `plan_windows`, and `targets` is the number of labels in the batch itself.

    Raises:
        DataError: there is no shard, one is not in the index, or is missing or damaged; the split has no window of that
            length; a setting is out of range. While iterating: a shard differs from its index, or there are fewer
            shards than workers on all nodes.
    """
    if batch_size < 1:
        raise DataError(f"batch_size {batch_size}: must be at least 1")
    if shuffle < 0:
        raise DataError(f"shuffle {shuffle}: must be 0 or more windows")
    DataConfig(objective=objective, mask_rate=mask_rate).validate()
    paths, index = _opened(shards)
    plan = plan_windows(index.segments, split, length, min_real)
    collate = _Collate(index, plan, mask_rate if objective == MASKED else None, seed)
    chance = random.Random(seed)
    return webdataset.DataPipeline(
        webdataset.SimpleShardList([str(path) for path in paths]),
        webdataset.split_by_node,
        webdataset.split_by_worker,
        _at_least_one_shard,
        webdataset.shuffle(len(paths), initial=len(paths), rng=chance) if shuffle else None,
        webdataset.tarfile_to_samples(),
        _WindowsOfRecords(index, plan),
        webdataset.shuffle(shuffle, initial=shuffle, rng=chance) if shuffle else None,
        webdataset.batched(batch_size, collation_fn=collate, partial=True),
    )


def _opened(shards: str | Path | Sequence[str | Path]) -> tuple[list[Path], ShardIndex]:
    """The tars that `shards` names, and their index."""
    names = [shards] if isinstance(shards, str | Path) else list(shards)
    for name in names:
        if "://" in str(name) or str(name).startswith("pipe:"):
            raise DataError(
                f"{name}: only local shards: copy them to a disk, or use data.shards with SequenceDataModule"
            )
    if len(names) == 1 and Path(names[0]).suffix != ".tar":
        index = ShardIndex.open(names[0])
        return [Path(names[0]) / name for name in index.sizes], index
    paths = [Path(path) for name in names for path in expand_urls(str(name))]
    if not paths:
        raise DataError("no shards: give a directory that `megabase prepare` wrote, or some of its tars")
    if len(folders := {path.parent for path in paths}) > 1:
        raise DataError(f"shards of {len(folders)} directories: give those of one, which its index describes")
    index = ShardIndex.open(paths[0].parent)
    for path in paths:
        if path.name not in index.sizes:
            raise DataError(f"{path}: is not a shard of the index beside it: name tars of {paths[0].parent}")
    return paths, index


def _at_least_one_shard(shards: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Pass shards on; raise DataError if this worker got none, which would leave it without a batch."""
    empty = True
    for shard in shards:
        empty = False
        yield shard
    if empty:
        raise DataError(
            "a worker got no shard: there are fewer shards than workers on all nodes together: use fewer workers, or"
            " prepare smaller shards (shard_bytes of megabase.datamodules.prepare.run.prepare)"
        )


class _WindowsOfRecords:
    """Cuts the records that WebDataset reads into the windows of a plan."""

    def __init__(self, index: ShardIndex, plan: WindowPlan) -> None:
        self._index = index
        self._plan = plan
        self._rows: dict[str, dict[str, list[int]]] = {name: {} for name in index.sizes}
        segments = index.segments
        for row in segments.rows_of(plan.split).tolist():
            if segments.line_bases[row]:
                raise DataError(
                    f"{self._index.store.name_of(segments.shard[row])}: holds FASTA members, which this cannot cut into"
                    " windows: use SequenceDataModule, or `megabase prepare` the FASTA files"
                )
            self._rows[segments.shard[row]].setdefault(segments.record[row], []).append(row)

    def __call__(self, samples: Iterable[dict[str, Any]]) -> Iterator[Window]:
        for shard, records in itertools.groupby(samples, key=lambda sample: Path(sample["__url__"]).name):
            missing = set(self._rows[shard])
            for record in records:
                name = _record_name(record)
                missing.discard(name)
                for row in self._rows[shard].get(name, ()):
                    yield from self._windows(row, _sequence(record))
            if missing:
                raise DataError(
                    f"{self._index.store.name_of(shard)}: record {min(missing)!r} of the index is not in it: copy index"
                    " and shards again"
                )

    def _windows(self, row: int, sequence: bytes) -> Iterator[Window]:
        segments = self._index.segments
        first, length = segments.start.item(row), segments.length.item(row)
        bases = np.frombuffer(sequence, np.uint8)[first : first + length]
        if isal_zlib.crc32(bases) != segments.crc32[row]:
            raise DataError(
                f"{self._index.store.name_of(segments.shard[row])}: record {segments.record[row]!r} differs from its"
                " checksum: copy the shard again"
            )
        ids = self._plan.ids_of_row(row)
        _, starts = self._plan.locate(ids)
        for window, start in zip(ids.tolist(), starts.tolist(), strict=True):
            # A copy: a view would keep the whole record in memory for as long as the shuffle buffer holds the window.
            yield window, bases[start : start + self._plan.length].copy()


def _record_name(sample: dict[str, Any]) -> str:
    """The name of a record in the index: what its .json says, else its key."""
    try:
        about = json.loads(sample.get("json", b"{}"))
        return str(about["record"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return str(sample["__key__"])


def _sequence(sample: dict[str, Any]) -> bytes:
    for kind in _SEQUENCE_MEMBERS:
        if kind in sample:
            content: bytes = sample[kind]
            return content
    raise DataError(
        f"{sample['__url__']}: {sample['__key__']} has no member .seq or .txt, which alone can be cut into windows: use"
        " SequenceDataModule"
    )


class _Collate:
    """Windows -> a batch, encoded as in training."""

    def __init__(
        self, index: ShardIndex, plan: WindowPlan, mask_rate: float | None, seed: int | None
    ) -> None:
        self._alphabet = index.alphabet
        self._plan = plan
        self._mask_rate = mask_rate
        self._chance = np.random.default_rng(seed)

    def __call__(self, windows: list[Window]) -> Batch:
        ids = np.array([window for window, _ in windows], np.int64)
        bases = np.zeros((len(windows), 1 + self._plan.length), np.uint8)  # the first column is room for bos
        bases[:, 1:] = [text for _, text in windows]
        raw = Raw(bases, ids, np.zeros(len(ids), bool))
        letters = self._plan.count_letters(*self._plan.locate(ids))
        if self._mask_rate is None:
            return causal_batch(raw, self._alphabet, int(letters.sum()))
        keys = self._chance.integers(0, 2**64, len(ids), np.uint64)
        targets = int(masked_count(letters, self._mask_rate).sum())
        return masked_batch(raw, self._alphabet, targets, keys=keys, rate=self._mask_rate)
