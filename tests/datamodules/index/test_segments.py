"""The identity of a shard set."""

from pathlib import Path
from typing import Any

import pytest

from megabase.datamodules.index.shard_index import ShardIndex
from megabase.datamodules.prepare.run import prepare


@pytest.mark.parametrize(
    ("splits", "identity"),
    [({"valid": 0.2, "test": 0.1}, "927536ef7ce336d6"), ({}, "124dea735b9e664c")],
    ids=["split", "whole"],
)
def test_identity_never_changes(
    lambda_fasta: Path, tmp_path: Path, splits: dict[str, float], identity: str
) -> None:
    shards = prepare([lambda_fasta], tmp_path / "shards", progress=False, **splits)
    assert shards.segments.identity == identity


def test_identity_depends_on_bases_and_splits_not_on_files(lambda_shards: ShardIndex, tmp_path: Path) -> None:
    two_genomes = [tmp_path / name for name in ("one.fa", "two.fa")]
    for path, letter in zip(two_genomes, "AC", strict=True):
        path.write_text(f">{path.stem}\n" + f"{letter}GT" * 900 + "\n")
    options: dict[str, Any] = {"valid": "0.1", "jobs": 1, "progress": False}
    whole = prepare(two_genomes, tmp_path / "whole", **options)
    cut = prepare(two_genomes, tmp_path / "cut", shard_bytes=1024, **options)
    assert len(cut.sizes) > len(whole.sizes)
    assert cut.segments.identity == whole.segments.identity
    others = [
        prepare(two_genomes, tmp_path / "split", **options | {"valid": "0.2"}),
        prepare(two_genomes[::-1], tmp_path / "order", **options),
        lambda_shards,
    ]
    assert len({index.segments.identity for index in (whole, *others)}) == 4
