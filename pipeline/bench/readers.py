"""The loaders that `megabase bench data` compares, each reading the same records in its own format.

A contestant starts at the n-th sequence of an epoch and yields the number of bases of each batch or record that it
reads. Ours reads training batches: checked, encoded and collated. The peers read the bytes of records, neither encoded
nor collated: that is their fastest way, and less work than ours. `encoded` adds the work that their user has to add for
training. All read in one process, from the page cache, with their default checks.
"""

from __future__ import annotations

import importlib
import itertools
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from megabase.datamodules.alphabet import BOS, Alphabet
from megabase.datamodules.config import DataConfig
from megabase.datamodules.datamodule import SequenceDataModule
from megabase.datamodules.index.segments import TRAIN
from megabase.datamodules.index.shard_index import ShardIndex
from megabase.datamodules.prepare.run import prepare
from megabase.pipeline.bench.contest import OURS, Entry, LeftOut, Reason

SEED = 7
"""Seed of the records and of every order."""

SHUFFLE_BUFFER = 1000
"""Records that webdataset's shuffle holds."""

CHUNK_BYTES = 64 << 20
"""Size of LitData's files; MosaicML Streaming's default is the same."""

PACKAGES = ("webdataset", "mosaicml-streaming", "litdata")

ALONE = ("mosaicml-streaming",)
"""Packages that need an environment of their own, with older versions of numpy and transformers than ours
(0.13: numpy < 2.2, transformers < 5)."""


@dataclass(frozen=True)
class Records:
    """`count` records of `length` random bases. folder: where every format of them lies or is made.

    micro_batch: sequences of one batch.
    """

    folder: Path
    length: int
    count: int
    micro_batch: int

    @property
    def bases(self) -> int:
        """Number of bases in all records together."""
        return self.count * self.length

    @property
    def shards(self) -> Path:
        """The directory of shards, written by `megabase prepare` at the first use."""
        shards = self.folder / "shards"
        if not shards.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            fasta = self.folder / "records.fa"
            write_fasta(fasta, self.length, self.count)
            prepare([fasta], shards, progress=False)
            fasta.unlink()
        return shards

    def sequences(self) -> Iterator[bytes]:
        """The bases of every record."""
        index = ShardIndex.open(self.shards)
        for row in range(len(index.segments)):
            yield index.read(row, 0, self.length).tobytes()

    def written(self, name: str, write: Callable[[Records, Path], None]) -> Path:
        """The directory of a peer's format, written at the first use."""
        folder = self.folder / name
        if not folder.exists():
            partial = folder.with_name(name + ".partial")
            shutil.rmtree(partial, ignore_errors=True)
            self.folder.mkdir(parents=True, exist_ok=True)
            write(self, partial)
            partial.rename(folder)
        return folder


def write_fasta(path: Path, length: int, count: int) -> None:
    """`count` records of `length` random letters A C G T."""
    letters = np.frombuffer(b"ACGT", np.uint8)
    generator = np.random.default_rng(SEED)
    with path.open("wb") as file:
        for number in range(count):
            bases = letters[generator.integers(0, 4, length, np.uint8)]
            file.write(b">record-%d\n%s\n" % (number, bases.tobytes()))


Open = Callable[[Records, int], Iterator[int]]


@dataclass(frozen=True)
class Contestant:
    """open: (records, number of the first sequence) -> number of bases of each batch or record from there on.

    resumes: whether it can start at another sequence than the first.
    """

    entry: Entry
    open: Open
    resumes: bool = True


def load(module: str, package: str) -> Any:
    """A module of a peer. Raises LeftOut with the command that installs it."""
    try:
        version(package)
    except PackageNotFoundError:
        how = f"pip install {package}{', in an environment of its own' if package in ALONE else ''}"
        raise LeftOut(Reason(f"not installed ({how})", for_good=True)) from None
    return importlib.import_module(module)


def ours(records: Records, first: int) -> Iterator[int]:
    """The training loader's batches, as a trainer at step first / micro_batch gets them."""
    module = data_module(records)
    module.trainer = at_step(first // records.micro_batch)
    return sizes(module.train_dataloader())


def ours_in_order(records: Records, first: int) -> Iterator[int]:
    """Batches of the same windows in the order of the shards, as in evaluation."""
    return sizes(data_module(records).eval_dataloader(TRAIN))


def data_module(records: Records) -> SequenceDataModule:
    """Our data module on these records, reading in this process."""
    config = DataConfig(
        shards=str(records.shards),
        length=records.length,
        global_batch=records.micro_batch,
        micro_batch=records.micro_batch,
        workers=0,
    )
    return SequenceDataModule(config, SEED)


def at_step(step: int) -> Any:
    """A stand-in for the trainer, with the attributes that the data module reads."""
    return SimpleNamespace(global_step=step, global_rank=0, world_size=1)


def sizes(loader: Any) -> Iterator[int]:
    """Number of tokens of each batch."""
    return (batch.tokens.numel() for batch in loader)


Read = Callable[[Records, int], Iterator[bytes]]
"""(records, number of the first sequence) -> the bases of each record from there on."""


def raw(read: Read) -> Open:
    """A contestant that only reads records."""
    return lambda records, first: map(len, read(records, first))


def encoded(read: Read) -> Open:
    """A contestant that also encodes and collates records as our batches are: one byte for a token."""
    table = Alphabet.named("dna").table.astype(np.uint8).tobytes()

    def open_at(records: Records, first: int) -> Iterator[int]:
        stream = read(records, first)
        while batch := list(itertools.islice(stream, records.micro_batch)):
            codes = np.full((len(batch), records.length + 1), BOS, np.uint8)
            for row, sequence in zip(codes, batch, strict=True):
                row[1:] = np.frombuffer(sequence.translate(table), np.uint8)
            yield torch.from_numpy(codes)[:, :-1].numel()

    return open_at


def webdataset(shuffled: bool) -> Read:
    """WebDataset over the same tars, undecoded. It saves no position: to resume, it reads all records before."""

    def read(records: Records, first: int) -> Iterator[bytes]:
        library = load("webdataset", "webdataset")
        tars = sorted(str(path) for path in records.shards.glob("*.tar"))
        dataset = library.WebDataset(tars, shardshuffle=False)
        if shuffled:
            dataset = dataset.shuffle(SHUFFLE_BUFFER, seed=SEED)
        return (sample["seq"] for sample in itertools.islice(dataset, first, None))

    return read


def mosaic(shuffled: bool) -> Read:
    """StreamingDataset over local MDS files of one column of bytes."""

    def read(records: Records, first: int) -> Iterator[bytes]:
        library = load("streaming", "mosaicml-streaming")
        folder = records.written("mosaicml-streaming", write_mosaic)
        dataset = library.StreamingDataset(
            local=str(folder), shuffle=shuffled, shuffle_seed=SEED, batch_size=records.micro_batch
        )
        if first:
            dataset.load_state_dict(
                {
                    "epoch": 0,
                    "sample_in_epoch": first,
                    "num_canonical_nodes": 1,
                    "shuffle_seed": SEED,
                    "initial_physical_nodes": 1,
                }
            )
        return (sample["seq"] for sample in dataset)

    return read


def write_mosaic(records: Records, folder: Path) -> None:
    """The records as MDS files, uncompressed."""
    library = load("streaming", "mosaicml-streaming")
    with library.MDSWriter(out=str(folder), columns={"seq": "bytes"}) as writer:
        for sequence in records.sequences():
            writer.write({"seq": sequence})


def litdata(shuffled: bool) -> Read:
    """StreamingDataset over local chunks of items of bytes. It hands over views of mapped files, which have not
    been read yet: they are copied, as webdataset and MosaicML Streaming do."""

    def read(records: Records, first: int) -> Iterator[bytes]:
        library = load_litdata("litdata")
        folder = records.written("litdata", write_litdata)

        def dataset() -> Any:
            return library.StreamingDataset(str(folder), shuffle=shuffled, seed=SEED)

        opened = dataset()
        if first:
            state = dataset().state_dict(first, num_workers=0, batch_size=records.micro_batch)
            opened.load_state_dict(state)
        return map(bytes, opened)

    return read


def load_litdata(module: str) -> Any:
    """A module of LitData, without its query of the package registry for a newer version."""
    os.environ.setdefault("LITDATA_DISABLE_VERSION_CHECK", "1")
    return load(module, "litdata")


def write_litdata(records: Records, folder: Path) -> None:
    """The records as LitData's chunks, uncompressed."""
    cache = load_litdata("litdata.streaming.cache").Cache(str(folder), chunk_bytes=CHUNK_BYTES)
    for number, sequence in enumerate(records.sequences()):
        cache[number] = sequence
    cache.done()
    cache.merge()


def copy(records: Records, first: int) -> Iterator[int]:
    """numpy.copyto of as many bytes, from memory to memory, both in use before: the lower bound of any reading."""
    source = np.full(records.bases, ord("A"), np.uint8)
    target = source.copy()

    def copied() -> Iterator[int]:
        np.copyto(target, source)
        yield target.size

    return copied()


def _contestants() -> Iterator[Contestant]:
    def entry(name: str, label: str) -> Entry:
        return Entry(name, label, growth=0.0)  # the same number of bases at every length

    yield Contestant(entry(OURS, "megabase, shuffled"), ours)
    yield Contestant(entry(f"{OURS}-in-order", "megabase, in order"), ours_in_order, resumes=False)
    for name, label, reader in (
        ("webdataset", "webdataset", webdataset),
        ("mosaicml-streaming", "MosaicML Streaming", mosaic),
        ("litdata", "LitData", litdata),
    ):
        shuffled = reader(shuffled=True)
        yield Contestant(entry(name, f"{label}, in order"), raw(reader(shuffled=False)))
        yield Contestant(entry(f"{name}-shuffled", f"{label}, shuffled"), raw(shuffled))
        kind = f"{name}-encoded"
        yield Contestant(entry(kind, f"{label}, shuffled, encoded"), encoded(shuffled), resumes=False)
    yield Contestant(entry("copy", "memory copy"), copy, resumes=False)


CONTESTANTS: Mapping[str, Contestant] = {contestant.entry.name: contestant for contestant in _contestants()}
