"""GenBank and EMBL files, written by Biopython, are read by name and bases."""

import gzip
import sys
from pathlib import Path

import pytest
from Bio import SeqIO
from Bio.Seq import Seq
from Bio.SeqRecord import SeqRecord

from megabase.datamodules.errors import DataError
from megabase.datamodules.prepare.run import prepare


@pytest.fixture
def records(lambda_bases: bytes) -> list[SeqRecord]:
    def record(name: str, bases: bytes) -> SeqRecord:
        return SeqRecord(
            Seq(bases),
            id=name,
            name=name.split(".")[0],
            description="a phage",
            annotations={"molecule_type": "DNA"},
        )

    return [record("NC_001416.1", lambda_bases), record("X2.1", b"ACGTN")]


@pytest.mark.parametrize("form", ["genbank", "embl"])
def test_records_of_annotated_files(
    records: list[SeqRecord], lambda_bases: bytes, tmp_path: Path, form: str
) -> None:
    path = tmp_path / "phage.dat.gz"
    with gzip.open(path, "wt") as file:
        SeqIO.write(records, file, form)
    index = prepare([path], tmp_path / "out", progress=False)
    assert index.segments.record.tolist() == ["NC_001416.1", "X2.1"]
    assert index.read(0, 0, len(lambda_bases)).tobytes() == lambda_bases.upper()


def test_damaged_files_and_records_without_a_sequence_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.gb"
    path.write_text("LOCUS nonsense\n")
    with pytest.raises(DataError, match=r"a.gb: (not GenBank|the file holds no GenBank record)"):
        prepare([path], tmp_path / "out", progress=False)
    path.write_text(
        "LOCUS       A   9 bp    DNA     linear   UNK 01-JAN-1980\nCONTIG      join(X:1..9)\n//\n"
    )
    with pytest.raises(DataError, match=r"a.gb: record 'A' has no sequence, only annotation"):
        prepare([path], tmp_path / "out", progress=False)


def test_without_biopython_the_message_says_what_the_file_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.gb"
    path.write_text("LOCUS       A\n")
    monkeypatch.setitem(sys.modules, "Bio", None)
    with pytest.raises(
        DataError, match=r"a.gb: is GenBank, and reading it needs Biopython: `pip install biopython`"
    ):
        prepare([path], tmp_path / "out", progress=False)
