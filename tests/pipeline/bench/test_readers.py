"""The loaders that `megabase bench data` compares: each reads every record, and resumes where it should."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from megabase.pipeline.bench import readers
from megabase.pipeline.bench.contest import LeftOut
from megabase.pipeline.bench.data_task import DataTask

MIB = 1 << 20


PEERS = [name for name in readers.CONTESTANTS if not name.startswith("ours") and name != "copy"]


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> readers.Records:
    return DataTask(tmp_path_factory.mktemp("records"), MIB).records(8192)


def is_installed(name: str) -> bool:
    try:
        version(name.removesuffix("-shuffled").removesuffix("-encoded"))
    except PackageNotFoundError:
        return False
    return True


@pytest.mark.parametrize("name", PEERS)
def test_every_peer_reads_the_rest_of_the_epoch(name, records):
    if not is_installed(name):
        pytest.skip(f"{name} is not installed")
    for first in (0, records.count // 2)[: 1 + readers.CONTESTANTS[name].resumes]:
        left = (records.count - first) * records.length
        assert sum(readers.CONTESTANTS[name].open(records, first)) == left


@pytest.mark.parametrize("read", [readers.webdataset, readers.mosaic, readers.litdata])
def test_peers_resume_in_the_order_of_an_uninterrupted_epoch(read, records):
    try:
        whole = list(read(shuffled=False)(records, 0))
    except LeftOut as missing:
        pytest.skip(str(missing))
    assert whole == list(records.sequences())
    assert list(read(shuffled=False)(records, records.count // 2)) == whole[records.count // 2 :]
    shuffled = list(read(shuffled=True)(records, 0))
    assert sorted(shuffled) == sorted(whole)
    assert list(read(shuffled=True)(records, records.count // 2)) == shuffled[records.count // 2 :]


def test_ours_resumes_in_the_training_order(records):
    module = readers.data_module(records)
    whole = [batch.samples.tolist() for _, batch in zip(range(4), module.train_dataloader(), strict=False)]
    module.trainer = readers.at_step(2)
    resumed = [batch.samples.tolist() for _, batch in zip(range(2), module.train_dataloader(), strict=False)]
    assert resumed == whole[2:]


def test_all_formats_hold_the_same_letters(records):
    sequences = list(records.sequences())
    assert len(set(sequences)) == records.count
    assert set(b"".join(sequences)) == set(b"ACGT")


def test_half_a_format_is_never_read(records):
    def broken(records: readers.Records, folder: Path) -> None:
        folder.mkdir()
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        records.written("broken", broken)
    assert not (records.folder / "broken").exists()
    assert records.written("broken", lambda records, folder: folder.mkdir()).is_dir()
