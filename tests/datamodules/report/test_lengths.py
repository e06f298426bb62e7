"""Windows of one length, and the bases in none, against counts made by hand."""

from pathlib import Path

import pytest

from megabase.datamodules.errors import DataError
from megabase.datamodules.index.shard_index import ShardIndex
from megabase.datamodules.prepare.run import prepare
from megabase.datamodules.report.lengths import LengthReport, at_length


@pytest.fixture
def shards(tmp_path: Path) -> ShardIndex:
    """Records of 1,050, 99 and 100 bases, and one of 300 of which 200 are N."""
    fasta = tmp_path / "a.fa"
    records = {"a": "ACGTA" * 210, "b": "A" * 99, "c": "C" * 100, "d": "G" * 100 + "N" * 200}
    fasta.write_text("".join(f">{name}\n{bases}\n" for name, bases in records.items()))
    return prepare([fasta], tmp_path / "out", progress=False)


def test_every_base_is_somewhere(shards: ShardIndex) -> None:
    assert at_length(shards.segments, "train", 100) == LengthReport(
        "train", 100, 1549, 12, 1, 99, 50, 200, 13
    )
    assert at_length(shards.segments, "train", 1100) == LengthReport("train", 1100, 1549, 0, 4, 1549, 0, 0, 1)
    with pytest.raises(DataError, match="--length 0: must be at least 1 base"):
        at_length(shards.segments, "train", 0)


def test_intervals_have_windows_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "a.fa").write_text(">a\n" + "ACGT" * 100 + "\n")
    (tmp_path / "a.bed").write_text("a\t10\t110\ttrain\na\t150\t170\ttrain\n")
    index = prepare([tmp_path / "a.fa"], tmp_path / "out", intervals=tmp_path / "a.bed", progress=False)
    assert at_length(index.segments, "train", 50) == LengthReport("train", 50, 400, 3, 0, 0, 250, 0, 3)
