"""Reading a VCF: what is refused, with which message, and what is skipped and counted."""

import dataclasses
import gzip
from pathlib import Path

import pysam
import pytest

from megabase.pipeline import cli
from megabase.pipeline.errors import UserError
from megabase.pipeline.inference.genome import Genome
from megabase.pipeline.inference.variants.calls import parse_renames, read_calls
from megabase.pipeline.inference.variants.edits import Edit
from tests.pipeline.inference.test_export import CONFIG, write_checkpoint
from tests.pipeline.inference.variants.test_command import COLUMNS, HEADER, folder, variants, write_vcf

__all__ = ["folder"]
GOOD = ("chr1", 14, ".", "C", "G")


@pytest.fixture(scope="module")
def genome(folder: Path) -> Genome:
    return Genome(folder / "genome.fa")


@pytest.mark.parametrize(
    ("lines", "more", "message"),
    [
        ([GOOD, ("chr1", 14, ".", "CGA", "A")], [], "chr1:14: REF is A and the genome has t at chr1:16"),
        ([("chr1", 16, ".", "G" * 30, "A")], [], f"REF is {'G' * 20}... (30 bases) and the genome has taccg"),
        ([("2", 1, ".", "G", "A")], [], "has no record '2'; if it is 'chr2', add --rename '2=chr2'"),
        ([("chrX", 1, ".", "G", "A")], ["--rename", "chrX=chr7"], "has no record 'chr7'"),
        ([("chr2", 147, ".", "AG", "A")], [], "REF AG ends at base 148, but record 'chr2'"),
        ([("chr2", 5, ".", "A", ".")], [], "holds no variant"),
        ([("chr2", "five", ".", "A", "C")], [], "record 1 cannot be read"),
        ([GOOD, ("chr2",)], [], "record 2 cannot be read"),
        ([GOOD], ["--downstream", "-1"], "--downstream -1: must be 0 or more"),
        ([GOOD], ["--context", "-1"], "--context -1: must be 0 or more"),
        ([GOOD], ["--hash-seeds", "0"], "--hash-seeds 0: must be 1 or more"),
        ([GOOD], ["--null", "1"], "--null 1: one random variant has no standard deviation"),
        ([GOOD], ["--seed", "-1"], "--seed -1: must be 0 or more"),
        ([GOOD], ["--rename", "chr1"], "--rename chr1: give FROM=TO, or a file"),
        ([GOOD], ["--genome", "none.fa"], "none.fa: there is no such file"),
        ([GOOD], ["-o", "out.vcf"], "--output out.vcf: the name must end in .vcf.gz or .parquet"),
    ],
)
def test_bad_input(
    lines: list,
    more: list,
    message: str,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_vcf(folder / "bad.vcf", lines)
    assert variants(folder, tmp_path / "out.parquet", *more, vcf="bad.vcf") == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1, captured.err
    assert message in captured.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "content", ["", ">a\nACGT\n", "##fileformat=VCFv4.2\nc\t5\t.\tA\tC\t.\t.\t.\n", None]
)
def test_files_that_are_no_vcf(
    content: str | None, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "bad.vcf").unlink(missing_ok=True)
    if content is not None:
        (folder / "bad.vcf").write_text(content)
    assert variants(folder, tmp_path / "out.parquet", vcf="bad.vcf") == 2
    message = "there is no such file: give a VCF" if content is None else "cannot be read as VCF or BCF"
    assert message in capsys.readouterr().err


def test_outputs_that_exist(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out.vcf.gz").touch()
    assert variants(folder, tmp_path / "out.vcf.gz") == 2
    assert "out.vcf.gz exists: remove it, or choose another --output" in capsys.readouterr().err
    field = '##INFO=<ID=LLR,Number=1,Type=Float,Description="of another program">\n'
    (folder / "scored.vcf").write_text(HEADER + field + COLUMNS + "chr1\t14\t.\tC\tG\t.\t.\t.\tGT\t0/1\n")
    assert variants(folder, tmp_path / "new.vcf.gz", vcf="scored.vcf") == 2
    assert "has INFO fields LLR already: remove them first" in capsys.readouterr().err


def test_models_that_cannot_score_are_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megabase.models.reading.LONGEST_WITH_FULL_LAYERS", 90)
    for name, changes, more, message in (
        ("both", {"causal": False}, [], "model.causal=False"),
        ("chunk", {"lsh": dataclasses.replace(CONFIG.lsh, attend="chunk")}, [], "model.lsh.attend"),
        ("full", {"layers": ["full"]}, [], "model.layers has 'full'"),
        ("plain", {"layers": ["local"]}, ["--hash-seeds", "2"], "--hash-seeds 2: the model has no lsh"),
    ):
        write_checkpoint(tmp_path / name, dataclasses.replace(CONFIG, **changes), 5)
        given = ["variants", tmp_path / name, folder / "calls.vcf", "--genome", folder / "genome.fa"]
        assert cli.main([*map(str, given), "-o", str(tmp_path / "out.parquet"), *more]) == 2
        assert message in capsys.readouterr().err
        assert not list(tmp_path.glob("out.parquet*"))  # before anything is read


def test_variants_that_do_not_fit_are_counted(genome: Genome, tmp_path: Path) -> None:
    lines = [("chr9", 1, ".", "G", "A"), ("chr1", 14, ".", "T", "G,A"), ("chr2", 148, ".", "A", "C"), GOOD]
    calls = read_calls(write_vcf(tmp_path / "x.vcf", lines), genome, {}, keep_going=True)
    assert calls.skipped == {"unknown_chromosome": 1, "ref_differs": 2, "beyond_the_end": 1}
    assert [one.edit for one in calls.alternates if one.edit] == [Edit("chr1", 13, 14, b"G")]
    assert list(calls.order) == [1, 3, 2, 0]


def test_any_compression_is_read(genome: Genome, tmp_path: Path) -> None:
    plain = write_vcf(tmp_path / "x.vcf", [GOOD])
    (tmp_path / "gzip.vcf.gz").write_bytes(gzip.compress(plain.read_bytes()))
    pysam.tabix_compress(str(plain), str(tmp_path / "bgzip.vcf.gz"))
    with pysam.VariantFile(str(plain)) as file:
        file.header.contigs.add("chr1")
        file.header.info.add("AF", 1, "String", "frequency")
        with pysam.VariantFile(str(tmp_path / "x.bcf"), "wb", header=file.header) as target:
            for record in file:
                target.write(record)
    wanted = read_calls(plain, genome, {}).alternates
    for name in ("gzip.vcf.gz", "bgzip.vcf.gz", "x.bcf"):
        assert read_calls(tmp_path / name, genome, {}).alternates == wanted


def test_letters_that_vcf_cannot_write_are_not_compared(genome: Genome, tmp_path: Path) -> None:
    # The genome has NNNR there, of which VCF makes NNNA; N in REF stands for any base.
    lines = [("chr1", 9, ".", "NNNA", "C"), ("chr1", 13, ".", "NC", "T")]
    assert not read_calls(write_vcf(tmp_path / "x.vcf", lines), genome, {}).skipped


def test_renames(tmp_path: Path) -> None:
    (tmp_path / "names").write_text("1 chr1\n2\tchr2\n")
    assert parse_renames([str(tmp_path / "names"), "MT=chrM"]) == {"1": "chr1", "2": "chr2", "MT": "chrM"}
    (tmp_path / "names").write_text("1 chr1\n2\n")
    with pytest.raises(UserError, match="line 2: '2' is not the name of a chromosome in the VCF, and in"):
        parse_renames([str(tmp_path / "names")])
