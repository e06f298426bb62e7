"""What a held-out split shares with training is measured, and warned about."""

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset

from megabase.datamodules.index.leakage import LEAKAGE_NAME, read_leakage
from megabase.datamodules.prepare.foreign import index_tars
from megabase.datamodules.prepare.leaks import leaks_of
from megabase.datamodules.prepare.run import prepare


def genome(length: int, seed: int) -> bytes:
    return np.random.default_rng(seed).choice(np.frombuffer(b"ACGT", np.uint8), length).tobytes()


def strain(of: bytes, every: int) -> bytes:
    """The genome with one base in `every` changed."""
    changed = bytearray(of)
    for at in range(0, len(of), every):
        changed[at] = b"TGCA"["ACGT".index(chr(of[at]))]
    return bytes(changed)


def test_shares_are_of_the_union_of_all_parts() -> None:
    def kmers(*hashes: int) -> np.ndarray:
        return np.array(hashes, np.uint64)

    one = {"train": kmers(1, 2, 3), "valid": kmers(3, 9)}
    two = {"train": kmers(3, 4), "valid": kmers(4, 8, 9), "test": kmers()}
    found = {leak.split: (leak.kmers, leak.in_training) for leak in leaks_of([one, two])}
    assert found == {"valid": (4, 2)}
    assert leaks_of([]) == leaks_of([{"train": kmers(1)}]) == []


def test_a_strain_of_the_training_genome_is_warned_about(
    tmp_path: Path, write_fasta: Callable[[Path, dict[str, bytes]], Path], caplog: pytest.LogCaptureFixture
) -> None:
    wild = genome(60_000, 1)
    records = {"wild": wild, "strain": strain(wild, 100), "other": genome(60_000, 2)}
    fasta = write_fasta(tmp_path / "a.fa", records)
    with caplog.at_level(logging.WARNING):
        index = prepare([fasta], tmp_path / "out", valid="other", test="strain", progress=False)
    test, valid = read_leakage(index.store)
    assert 0.66 < test.share < 0.73  # 69 of 100 31-mers have no changed base
    assert valid.share == 0
    assert "test: 69% of its 31-mers occur in train" in caplog.text.replace(f"{test.share:.0%}", "69%")
    assert "valid:" not in caplog.text
    other = write_fasta(tmp_path / "b.fa", records)
    prepare([fasta], tmp_path / "all", progress=False)
    assert not (tmp_path / "all" / LEAKAGE_NAME).exists()
    assert (
        read_leakage(prepare([fasta, other], tmp_path / "text", "bytes", valid="b.fa", progress=False).store)
        == []
    )


def test_an_index_of_foreign_tars_is_measured(tmp_path: Path, lambda_bases: bytes) -> None:
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        writer.write({"__key__": "a", "seq": lambda_bases})
        writer.write({"__key__": "b", "seq": lambda_bases[:9000]})
    index = index_tars(tmp_path, valid="b", progress=False)
    assert [leak.share for leak in read_leakage(index.store)] == [1.0]
    (tmp_path / "index.parquet").unlink()
    assert read_leakage(index_tars(tmp_path, progress=False).store) == []
