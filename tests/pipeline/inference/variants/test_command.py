"""`megabase variants` from its command line to the VCF or the table."""

import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pysam
import pytest
from pyarrow import parquet

from megabase.models import Seeds
from megabase.pipeline import cli
from megabase.pipeline.inference.genome import Genome
from megabase.pipeline.inference.model import load_model
from megabase.pipeline.inference.partial import Partial
from megabase.pipeline.inference.variants import command
from megabase.pipeline.inference.variants.edits import Edit, Strand
from megabase.pipeline.inference.variants.reading import Reader
from megabase.pipeline.inference.variants.walk import walk
from tests.pipeline.inference.test_export import CONFIG, write_checkpoint

GENOME = {"chr1": "ACGTTGCANNNRacgtaccgattacagatt" * 7, "chr2": "GATTACA" * 21}
HEADER = '##fileformat=VCFv4.2\n##FORMAT=<ID=GT,Number=1,Type=String,Description="Genotype">\n'
COLUMNS = "#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\tFORMAT\tone\n"
# Not in the order of the genome; the last one has an INFO field that the header does not define.
LINES = [
    ("chr2", 3, "x1", "T", "C,TAA,<DEL>"),
    ("chr1", 18, ".", "C", "."),
    ("chr1", 1, ".", "A", "*,N[chr2:5["),
    ("chr1", 19, ".", "CGATT", "CG,CGATT,CCC"),
    ("chr1", 14, ".", "C", "G"),
]
SAUREUS = Path(__file__).resolve().parents[5] / "shared" / "data" / "saureus"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with random weights, a genome, and a VCF."""
    path = tmp_path_factory.mktemp("variants")
    write_checkpoint(path / "run", CONFIG, 5)
    (path / "genome.fa").write_text("".join(f">{name}\n{letters}\n" for name, letters in GENOME.items()))
    write_vcf(path / "calls.vcf", LINES)
    return path


def write_vcf(path: Path, lines: list[tuple]) -> Path:
    rows = ["\t".join(map(str, line)) + "\t.\tPASS\tAF=0.5\tGT\t0/0\n" for line in lines]
    path.write_text(HEADER + COLUMNS + "".join(rows))
    return path


def variants(folder: Path, output: Path, *more: str, vcf: str = "calls.vcf") -> int:
    given = ["variants", folder / "run", folder / vcf, "--genome", folder / "genome.fa", "-o", output, *more]
    return cli.main([str(argument) for argument in given])


def rows(path: Path) -> list[dict]:
    found: list[dict] = parquet.read_table(path).to_pylist()
    return found


def test_the_table_has_the_scores_of_walks(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert variants(folder, tmp_path / "out.parquet", "--downstream", "20", "--json") == 0
    captured = capsys.readouterr()
    assert (
        "up to 210 bases are read before a variant, and the model was trained on windows of 64"
        in captured.err
    )
    summary = json.loads(captured.out)
    found = rows(tmp_path / "out.parquet")
    loaded, genome = load_model(folder / "run"), Genome(folder / "genome.fa")
    edits = [Edit("chr1", 13, 14, b"G"), Edit("chr1", 20, 23, b""), Edit("chr1", 19, 23, b"CC")]
    reader = Reader(loaded.model, Seeds(run=loaded.config.run.seed), downstream=20)
    terms = [
        walk(reader, Strand(genome, "chr1", loaded.alphabet, reverse), edits, lambda _: None)
        for reverse in (False, True)
    ]
    of_edits = [row for row in found if row["chromosome"] == "chr1" and row["kind"]]
    assert [row["kind"] for row in of_edits] == ["snv", "deletion", "indel"]
    for number, row in enumerate(of_edits):
        for strand, of in zip(("forward", "reverse"), terms, strict=True):
            allele = of["alternate"][number] - of["reference"][number]
            downstream = of["alternate_downstream"][number] - of["reference_downstream"][number]
            assert row[f"llr_allele_{strand}"] == pytest.approx(allele)
            assert row[f"llr_downstream_{strand}"] == pytest.approx(downstream)
            assert row[f"llr_{strand}"] == pytest.approx(allele + downstream)
            assert row[f"llr_downstream_bases_{strand}"] == of["downstream_bases"][number]
        assert row["llr"] == pytest.approx((row["llr_forward"] + row["llr_reverse"]) / 2)
        assert (row["llr_ref_bases"], row["llr_alt_bases"]) == ((1, 1), (3, 0), (4, 2))[number]
    # 20 bases before base 14 are read on the reverse strand; of the 13 there are, 4 are no letters.
    assert [of_edits[0][f"llr_downstream_bases_{strand}"] for strand in ("forward", "reverse")] == [20, 9]
    places = [(row["chromosome"], row["position"], row["alt"], row["llr_skipped"]) for row in found]
    assert places == [
        ("chr1", 1, "*", "overlapping_deletion"),
        ("chr1", 1, "N[chr2:5[", "breakend"),
        ("chr1", 14, "G", None),
        ("chr1", 19, "CG", None),
        ("chr1", 19, "CGATT", "same_as_ref"),
        ("chr1", 19, "CCC", None),
        ("chr2", 3, "C", None),
        ("chr2", 3, "TAA", None),
        ("chr2", 3, "<DEL>", "symbolic"),
    ]
    assert all((row["llr"] is None) == bool(row["llr_skipped"]) for row in found)
    assert (summary["alternates"], summary["scored"]) == (9, 5)
    assert summary["skipped"]["symbolic"] == 1 and summary["model"]["step"] == 5


@pytest.mark.slow
def test_the_vcf_has_the_numbers_of_the_table(folder: Path, tmp_path: Path) -> None:
    assert variants(folder, tmp_path / "out.parquet", "--hash-seeds", "3", "--null", "4") == 0
    for name in ("out.vcf.gz", "again.vcf.gz"):
        assert variants(folder, tmp_path / name, "--hash-seeds", "3", "--null", "4") == 0
    table = {(row["chromosome"], row["position"], row["alt"]): row for row in rows(tmp_path / "out.parquet")}
    with pysam.VariantFile(str(tmp_path / "out.vcf.gz")) as file:
        fields = {name: field for name, field in file.header.info.items() if name.startswith("LLR")}
        assert all(field.number == "A" and field.description for field in fields.values())
        assert file.header.contigs["chr2"].length == len(GENOME["chr2"])
        found = list(file)
        assert [(record.chrom, record.pos) for record in found] == [
            ("chr1", 1), ("chr1", 14), ("chr1", 18), ("chr1", 19), ("chr2", 3),
        ]  # fmt: skip
        for record in found:
            assert record.samples["one"]["GT"] == (0, 0) and record.info["AF"] == "0.5"
            for number, alt in enumerate(record.alts or ()):
                row = table[(record.chrom, record.pos, alt)]
                for name in fields:
                    value = record.info[name][number] if name in record.info else None
                    wanted = row[name.lower()]
                    assert value == (pytest.approx(wanted, rel=1e-5) if isinstance(wanted, float) else wanted)
        assert {name.lower() for name in fields} == {
            name for name in rows(tmp_path / "out.parquet")[0] if "llr" in name
        }
        assert [record.pos for record in file.fetch("chr1", 13, 18)] == [14, 18]  # by the index
    scored = [row for row in table.values() if row["llr"] is not None]
    for column in ("llr_null_z", "llr_null_p"):
        assert all(np.isfinite(row[column]) for row in scored)
    assert {row["llr_null_p"] for row in scored} <= {n / 5 for n in range(1, 6)}
    assert all(row["llr_sd"] > 1e-4 for row in scored if row["chromosome"] == "chr1")
    assert (tmp_path / "out.vcf.gz").read_bytes() == (tmp_path / "again.vcf.gz").read_bytes()
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["again.vcf.gz", "again.vcf.gz.tbi", "out.parquet", "out.vcf.gz", "out.vcf.gz.tbi"]


def overtaken(partial: Partial) -> bool:
    """All tasks are finished, and another process writes the output before this one reads them."""
    partial.output.write_text("of the other process")
    shutil.rmtree(partial.directory)
    return True


@pytest.mark.slow
def test_sharing_and_continuing_change_no_byte(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--context", "40", "--downstream", "9"]
    monkeypatch.setattr("megabase.pipeline.inference.variants.tasks.TASK_TOKENS", 100)
    assert variants(folder, tmp_path / "whole.parquet", *more) == 0
    for number in (2, 1):
        assert not (tmp_path / "out.parquet").exists()
        assert variants(folder, tmp_path / "out.parquet", *more, "--portion", f"{number}/2") == 0
    assert (tmp_path / "out.parquet").read_bytes() == (tmp_path / "whole.parquet").read_bytes()
    assert variants(folder, tmp_path / "two.parquet", *more, "--portion", "2/2") == 0
    with monkeypatch.context() as patched:
        patched.setattr(Partial, "is_complete", overtaken)
        assert variants(folder, tmp_path / "two.parquet", *more, "--portion", "1/2") == 0
    assert (tmp_path / "two.parquet").read_text() == "of the other process"
    done, run = [], command.Plan.run

    def stopped(*arguments: object) -> np.ndarray:
        done.append(1)
        if len(done) == 4:
            raise KeyboardInterrupt
        return run(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(command.Plan, "run", stopped)
    assert variants(folder, tmp_path / "killed.parquet", *more) == 130
    assert variants(folder, tmp_path / "killed.parquet", *more[:2]) == 2
    assert "was left by a call with another model, input or options" in capsys.readouterr().err
    assert variants(folder, tmp_path / "killed.parquet", *more) == 0
    assert len(done) == 4 + 3  # 6 tasks, one of them twice
    assert (tmp_path / "killed.parquet").read_bytes() == (tmp_path / "whole.parquet").read_bytes()


@pytest.mark.skipif(not SAUREUS.is_dir(), reason="the genome is not part of the project")
@pytest.mark.slow
def test_real_calls(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No ##contig lines, plain gzip, another name of the chromosome, deletions of 46,000 bases."""
    genome, record = tmp_path / "genome.fa", "gi|88193823|ref|NC_007795.1|"
    genome.write_bytes(gzip.decompress((SAUREUS / "NCTC8325.fasta.gz").read_bytes()))
    given = [folder / "run", SAUREUS / "variant.vcf.gz", "--genome", genome, "-o", tmp_path / "out.vcf.gz"]
    given += ["--context", "50", "--downstream", "10"]
    assert cli.main(["variants", *map(str, given)]) == 2
    assert f"if it is {record!r}, add --rename 'NC_007795={record}'" in capsys.readouterr().err
    assert cli.main(["variants", *map(str, given), "--rename", f"NC_007795={record}"]) == 0
    assert "ALTs: 109, scored: 109" in capsys.readouterr().out
    with pysam.VariantFile(str(tmp_path / "out.vcf.gz")) as file:
        assert file.header.contigs["NC_007795"].length == 2_821_361
        assert max(found.info["LLR_REF_BASES"][0] for found in file.fetch("NC_007795")) == 46_034
