"""Tables and folders become the same rows, and what cannot be one is refused in one line."""

import gzip
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from megabase.pipeline.errors import UserError
from megabase.pipeline.finetune.tables import Columns, Table, read_folder, read_table

ROWS = [("ACGT", "01", "train"), ("ggta", "NA", "test")]
WANTED = Table(["row 1", "row 2"], [b"ACGT", b"ggta"], ["01", "NA"], ["train", "test"])


def text(delimiter: str) -> str:
    return "".join(delimiter.join(row) + "\n" for row in [("sequence", "label", "split"), *ROWS])


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.csv.gz", "t.parquet"])
def test_every_kind_of_table_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name.endswith("parquet"):
        columns = zip(*ROWS, strict=True)
        parquet.write_table(
            pa.table(dict(zip(("sequence", "label", "split"), map(list, columns), strict=True))), path
        )
    else:
        content = text("\t" if "tsv" in name else ",").encode()
        path.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert read_table(path, Columns()) == WANTED


def test_columns_are_named(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("dna,y,part\nACGT,1,test\n")
    assert read_table(path, Columns("dna", "y", "part")).splits == ["test"]
    unlabelled = read_table(path, Columns("dna", None))
    assert (unlabelled.labels, unlabelled.splits) == ([], None)


def test_a_folder_of_files_or_of_folders(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / split / "b").mkdir(parents=True)
        (tmp_path / split / "a.fa").write_text(">x one\nAC\nGT\n>y\nGG\n")
        (tmp_path / split / "b" / "1.txt").write_text("TTTT\n")
    (tmp_path / "README.md").write_text("not a sequence")
    found = read_folder(tmp_path)
    assert found.sequences == [b"ACGT", b"GG", b"TTTT"] * 2
    assert found.labels == ["a", "a", "b"] * 2
    assert found.splits == ["test"] * 3 + ["train"] * 3
    assert found.names[0] == "test/a.fa: x" and found.names[2] == "test/b/1.txt: line 1"


@pytest.mark.parametrize(
    ("name", "content", "columns", "message"),
    [
        ("t.csv", "seq,label\nA,1\n", Columns(), "has no column 'sequence'.*it has seq, label.*--sequence"),
        ("t.csv", "sequence,y\nA,1\n", Columns(), "has no column 'label'.*--label"),
        ("t.csv", "sequence,label\n", Columns(), "has no rows"),
        ("t.csv", "sequence,label\nA,1\n,2\n", Columns(), "row 2: the sequence is empty"),
        ("t.csv", "sequence,label\nA,1,2\n", Columns(), "cannot be read as a table"),
        ("t.xlsx", "", Columns(), "a table ends in .csv, .tsv or .parquet"),
        ("t.parquet", "text", Columns(), "cannot be read as a table"),
    ],
)
def test_what_is_no_table_is_refused(
    tmp_path: Path, name: str, content: str, columns: Columns, message: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        read_table(tmp_path / name, columns)


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such file"):
        read_table(tmp_path / "none.csv", Columns())
    (tmp_path / "train").mkdir()
    with pytest.raises(UserError, match="holds no sequences: it needs"):
        read_folder(tmp_path)
