"""The webdataset pipeline, against the same windows read through the index."""

import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from torch.utils.data import DataLoader

from megabase.datamodules import webdataset_pipeline
from megabase.datamodules.batches.collate import Batch
from megabase.datamodules.batches.visits import evaluation_windows
from megabase.datamodules.config import DataConfig
from megabase.datamodules.errors import DataError
from megabase.datamodules.index.shard_index import ShardIndex
from megabase.datamodules.order.planning import plan_windows
from megabase.datamodules.prepare.foreign import index_tars
from megabase.datamodules.prepare.run import prepare


def by_id(batches: Any) -> dict[int, tuple[list[int], list[int]]]:
    """Tokens and labels of every window, by its id; no window comes twice."""
    found = {}
    for batch in batches:
        wide = batch.widened()
        for window, tokens, labels in zip(batch.samples.tolist(), wide.tokens, wide.labels, strict=True):
            assert window not in found
            found[window] = tokens.tolist(), labels.tolist()
    return found


def through_the_index(index: ShardIndex, length: int, split: str, **settings: Any) -> dict[int, Any]:
    """The same of evaluation's batches."""
    windows = evaluation_windows(DataConfig(length=length, **settings), index, split)
    ids = np.arange(len(windows.plan))
    return by_id([windows.batch(windows.visits(ids, np.zeros(len(ids), np.uint64)), 0)])


@pytest.mark.parametrize("shuffle", [0, 10])
@pytest.mark.parametrize(
    ("length", "split", "min_real"), [(64, "train", 0.5), (64, "valid", 0.9), (130, "test", 0.0)]
)
def test_windows_are_those_read_through_the_index(
    gappy_shards: ShardIndex, length: int, split: str, min_real: float, shuffle: int
) -> None:
    pipeline = webdataset_pipeline(
        gappy_shards.directory, length, batch_size=3, split=split, min_real=min_real, shuffle=shuffle, seed=1
    )
    batches = list(pipeline)
    assert isinstance(pipeline, webdataset.DataPipeline)
    assert all(len(batch.samples) == 3 for batch in batches[:-1])
    assert by_id(batches) == through_the_index(gappy_shards, length, split, min_real=min_real)
    assert all(batch.targets == int((batch.widened().labels >= 0).sum()) for batch in batches)
    again = list(pipeline)
    assert (order(again) == order(batches)) == (shuffle == 0)
    assert by_id(again) == by_id(batches)


def order(batches: list[Batch]) -> list[int]:
    return torch.cat([batch.samples for batch in batches]).tolist()


def test_bed_intervals_make_the_same_windows(tmp_path: Path, lambda_fasta: Path) -> None:
    name = "gi|9626243|ref|NC_001416.1|"
    bed = tmp_path / "a.bed"
    bed.write_text("".join(f"{name}\t{start}\t{start + 90}\ttrain\n" for start in (50, 100, 5000, 20_000)))
    index = prepare([lambda_fasta], tmp_path / "shards", intervals=bed, progress=False)
    found = by_id(webdataset_pipeline(index.directory, 128))
    assert found == through_the_index(index, 128, "train") and len(found) == 4


@pytest.mark.parametrize("workers", [0, 2])
def test_nodes_and_workers_share_out_the_shards(
    gappy_shards: ShardIndex, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    nodes, ids = 2, []
    for rank in range(nodes):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(nodes))
        pipeline = webdataset_pipeline(gappy_shards.directory, 64, batch_size=2, shuffle=5)
        ids.append(set(by_id(DataLoader(pipeline, batch_size=None, num_workers=workers))))
    assert not ids[0] & ids[1] and all(ids)
    assert ids[0] | ids[1] == set(range(len(plan_windows(gappy_shards.segments, "train", 64))))


@pytest.mark.parametrize("spelled", ["braces", "list", "path"])
def test_some_of_the_shards(gappy_shards: ShardIndex, spelled: str) -> None:
    folder, count = Path(gappy_shards.directory), len(gappy_shards.sizes)
    names = {
        "braces": f"{folder}/shard-{{00000..{count - 1:05d}}}.tar",
        "list": [folder / name for name in gappy_shards.sizes],
        "path": folder / "shard-00000.tar",
    }
    found = by_id(webdataset_pipeline(names[spelled], 64))
    plan = plan_windows(gappy_shards.segments, "train", 64)
    rows, _ = plan.locate(np.arange(len(plan)))
    wanted = np.ones(len(plan), bool)
    if spelled == "path":
        wanted = gappy_shards.segments.shard[rows] == "shard-00000.tar"
        assert 0 < wanted.sum() < len(plan)
    assert sorted(found) == np.flatnonzero(wanted).tolist()


def test_masked_bases_are_as_many_as_in_training_and_follow_from_the_seed(lambda_shards: ShardIndex) -> None:
    def first(seed: int | None) -> Batch:
        return next(
            iter(
                webdataset_pipeline(
                    lambda_shards.directory, 512, batch_size=4, objective="masked", mask_rate=0.2, seed=seed
                )
            )
        )

    batch = first(3)
    labels = batch.widened().labels
    assert ((labels >= 0).sum(dim=1) == round(0.2 * 512)).all() and batch.targets == 4 * round(0.2 * 512)
    assert torch.equal(first(3).codes, batch.codes) and not torch.equal(first(4).codes, batch.codes)
    shown = labels.where(labels >= 0, batch.widened().tokens)
    expected = [tokens for tokens, _ in through_the_index(lambda_shards, 512, "train").values()]
    assert shown[:, :-1].tolist() == [tokens[1:] for tokens in expected[:4]]


def test_text_of_other_tars_is_read(tmp_path: Path) -> None:
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as tar:
        tar.write({"__key__": "one", "txt": "ACGTACGTAC"})
    index_tars(tmp_path, progress=False)
    (batch,) = webdataset_pipeline(tmp_path, 5, batch_size=2)
    assert batch.labels.tolist() == [[5, 6, 7, 8, 5], [6, 7, 8, 5, 6]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda shards: ([], 64), "no shards: give a directory"),
        (lambda shards: (shards / "none", 64), "none: no such directory|none.*no index.parquet"),
        (
            lambda shards: (shards / "shard-99999.tar", 64),
            "shard-99999.tar: is not a shard of the index beside it",
        ),
        (lambda shards: ([shards / "a.tar", shards.parent / "b.tar"], 64), "shards of 2 directories"),
        (lambda shards: ("https://example.org/shard.tar", 64), "only local shards"),
        (lambda shards: (shards, 10**6), "has no window of data.length 1000000"),
        (lambda shards: (shards, 0), "data.length 0"),
    ],
)
def test_bad_input_is_one_clear_error(
    gappy_shards: ShardIndex, call: Callable[[Path], tuple[Any, int]], message: str
) -> None:
    with pytest.raises(DataError, match=message) as error:
        webdataset_pipeline(*call(Path(gappy_shards.directory)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("batch_size", 0), ("shuffle", -1), ("objective", "next"), ("mask_rate", 0.0), ("min_real", 2.0)],
)
def test_bad_setting_is_named(gappy_shards: ShardIndex, setting: str, value: Any) -> None:
    with pytest.raises(DataError, match=setting):
        webdataset_pipeline(gappy_shards.directory, 64, **{setting: value})


@pytest.mark.slow  # after an error torch waits 5 s for each worker
def test_worker_without_a_shard_is_an_error(lambda_shards: ShardIndex) -> None:
    pipeline = webdataset_pipeline(lambda_shards.directory, 512)
    with pytest.raises(DataError, match="fewer shards than workers"):
        list(DataLoader(pipeline, batch_size=None, num_workers=2))


def test_shard_that_differs_from_its_index_is_an_error(
    write_fasta: Callable[[Path, dict[str, bytes]], Path], tmp_path: Path
) -> None:
    index = prepare(
        [write_fasta(tmp_path / "a.fa", {"one": b"ACGT" * 100})], tmp_path / "shards", progress=False
    )
    shard = tmp_path / "shards" / "shard-00000.tar"
    content = bytearray(shard.read_bytes())
    content[int(index.segments.offset[0]) + 7] = ord("A")
    shard.write_bytes(content)
    with pytest.raises(DataError, match=r"shard-00000.tar: record 'one' differs from its checksum"):
        list(webdataset_pipeline(tmp_path / "shards", 64))
    renamed = shard.read_bytes().replace(b'"record": "one"', b'"record": "two"')
    shard.write_bytes(renamed)
    with pytest.raises(DataError, match=r"shard-00000.tar: record 'one' of the index is not in it"):
        list(webdataset_pipeline(tmp_path / "shards", 64))


def test_fasta_members_are_refused(tmp_path: Path) -> None:
    fasta = tmp_path / "a.fa"
    fasta.write_text(">one\nACGT\nACGT\n")
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "a.tar", "w") as tar:
        tar.add(fasta, "a.fa")
    index_tars(tmp_path / "tars", progress=False)
    with pytest.raises(DataError, match="holds FASTA members"):
        webdataset_pipeline(tmp_path / "tars", 4)


def test_importing_the_package_loads_neither_torch_nor_lightning() -> None:
    code = (
        "import sys, megabase.datamodules as d; assert callable(d.__getattr__);"
        "sys.exit(bool({'torch', 'pytorch_lightning', 'webdataset', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
