"""GFF and BED give the same classes; a damaged line is named."""

import gzip
from pathlib import Path

import numpy as np
import pytest

from megabase.datamodules.errors import DataError
from megabase.datamodules.report.annotation import read_annotation
from megabase.datamodules.report.classes import REST, Classes
from tests.datamodules.order.made import Made, made

GFF = """##gff-version 3
##sequence-region r 1 100
r\tx\tregion\t1\t100\t.\t+\t.\tID=r
r\tx\tgene\t3\t10\t.\t-\t.\tID=a
r\tx\tCDS\t3\t8\t.\t-\t0\tID=b;Parent=a
r\tx\trepeat_region\t7\t12\t.\t+\t.\tID=c
##FASTA
>r
ACGT
"""
WANTED = [("r", 2, 10, "gene"), ("r", 2, 8, "CDS"), ("r", 6, 12, "repeat_region")]


@pytest.mark.parametrize("name", ["a.gff", "a.gff3.gz", "a.GTF", "a.bed"])
def test_every_format_gives_the_same_features(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    text = GFF
    if name.endswith("bed"):
        text = "".join("\t".join(map(str, row)) + "\n" for row in WANTED)
    elif name.endswith("GTF"):
        text = GFF.split("##FASTA")[0].replace("ID=", 'gene_id "').replace("a\n", 'a";\n')
    path.write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    assert [row[:4] for row in read_annotation(path, "--annotation")] == WANTED


def test_a_base_counts_in_every_class_that_it_is_in(tmp_path: Path) -> None:
    (tmp_path / "a.gff").write_text(GFF)
    classes = Classes.read(tmp_path / "a.gff", made([Made(b"A" * 100, "valid", record="r")]), "valid")
    assert classes.names == ("CDS", "gene", "repeat_region", REST)
    masks = [np.flatnonzero(mask).tolist() for mask in classes.masks("r", 0, 20)]
    assert masks == [[*range(2, 8)], [*range(2, 10)], [*range(6, 12)], [0, 1, *range(12, 20)]]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("r x CDS", "line 2: not a line of GFF .*fewer than 9 fields"),
        (
            "r\tx\tCDS\tstart\t9\t.\t+\t.\tID=b",
            "line 2: not a line of GFF .*start and end of CDS are not numbers",
        ),
        ("r\tx\tCDS\t9\t3\t.\t+\t.\tID=b", "line 2: not a line of GFF .*hold no base"),
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "a.gff").write_text(f"r\tx\tgene\t3\t10\t.\t-\t.\tID=a\n{line}\n")
    with pytest.raises(DataError, match=message):
        list(read_annotation(tmp_path / "a.gff", "--annotation"))


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot be read .*give --annotation GFF or BED"):
        list(read_annotation(tmp_path / "none.gff.gz", "--annotation"))


@pytest.mark.slow
def test_genes_that_pyrodigal_finds_in_lambda_phage(tmp_path: Path) -> None:
    pyrodigal = pytest.importorskip("pyrodigal")
    with gzip.open(Path(__file__).parents[2] / "data" / "lambda_phage.fna.gz", "rt") as file:
        name, *lines = file.read().splitlines()
    record, sequence = name[1:].split()[0], "".join(lines)
    genes = pyrodigal.GeneFinder(meta=True).find_genes(sequence)
    with (tmp_path / "genes.gff").open("w") as out:
        genes.write_gff(out, record)
    classes = Classes.read(
        tmp_path / "genes.gff", made([Made(sequence.encode(), "valid", record=record)]), "valid"
    )
    coding = np.zeros(len(sequence), bool)
    for gene in genes:
        coding[gene.begin - 1 : gene.end] = True
    assert classes.names == ("CDS", REST)
    masks = classes.masks(record, 0, len(sequence))
    assert np.array_equal(masks, np.stack([coding, ~coding]))
    assert 0.8 < coding.mean() < 0.98  # phages have little between their genes
