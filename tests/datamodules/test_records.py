import gzip
from pathlib import Path

import pytest

from datamodules.alphabet import Alphabet
from datamodules.errors import DataError
from datamodules.records import read_records

FASTA = b">one first record\nACGTN\nacgt\n\n>two\r\nGG\r\n>three\n"


def read(*paths: Path, alphabet: str = "dna") -> list[tuple[str, str, bytes]]:
    records = read_records(paths, Alphabet.named(alphabet))
    return [(record.name, record.description, record.sequence) for record in records]


def put(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_fasta_is_read_as_it_is(tmp_path: Path) -> None:
    expected = [("one", "first record", b"ACGTNacgt"), ("two", "", b"GG"), ("three", "", b"")]
    assert read(put(tmp_path / "a.fa", FASTA)) == expected


@pytest.mark.parametrize("name", ["a.fa.gz", "a.fa", "a"])
def test_gzip_is_told_by_content_not_by_name(tmp_path: Path, name: str) -> None:
    two_members = gzip.compress(FASTA[:20]) + gzip.compress(FASTA[20:])  # as bgzip writes
    assert read(put(tmp_path / name, two_members)) == read(put(tmp_path / "plain.fa", FASTA))


def test_a_genome(lambda_fasta: Path, lambda_bases: bytes) -> None:
    assert read(lambda_fasta) == [
        ("gi|9626243|ref|NC_001416.1|", "Enterobacteria phage lambda, complete genome", lambda_bases)
    ]
    assert len(lambda_bases) == 48_502


def test_a_text_file_is_one_record(tmp_path: Path) -> None:
    text = ">no FASTA\nnaïve\r\n".encode() + bytes(range(256))
    assert read(put(tmp_path / "a.txt", text), alphabet="bytes") == [("a.txt", "", text)]
    assert read(put(tmp_path / "b.txt.gz", gzip.compress(text)), alphabet="bytes") == [("b.txt", "", text)]


def test_records_are_streamed(tmp_path: Path) -> None:
    """The first record comes before the second is looked at."""
    records = read_records([put(tmp_path / "a.fa", b">one\nAC\n>two\n!!\n")], Alphabet.named("dna"))
    assert next(records).name == "one"
    with pytest.raises(DataError):
        next(records)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.fa", b"", "empty.fa: the file holds no FASTA record"),
        ("blank.fa", b"\n\n", "blank.fa: the file holds no FASTA record"),
        ("none.fa.gz", gzip.compress(b""), "none.fa.gz: the file holds no FASTA record"),
        ("reads.fq", b"@read\nACGT\n+\nIIII\n", "reads.fq: not FASTA .*Expected '>'.*'@read'"),
        ("page.html", b"<html>404</html>", "page.html: not FASTA .*Expected '>'"),
        ("bare.txt", b"ACGTACGT\n", "bare.txt: not FASTA"),
        ("image.fa", b">\xff\xfe\x00\x80", "image.fa: not FASTA"),
        ("cut.fa.gz", gzip.compress(FASTA * 9)[:-12], "cut.fa.gz: the gzip data is cut off or damaged"),
        (
            "flip.fa.gz",
            gzip.compress(FASTA)[:-8] + b"\0" * 8,
            "flip.fa.gz: the gzip data is cut off or damaged",
        ),
        (
            "twice.fa",
            b">a\nA\n>b\nA\n>a\nC\n",
            "twice.fa: a second record is named 'a' .the first is in twice",
        ),
        ("nameless.fa", b"> a\nACGT\n", "nameless.fa: a record has no name"),
        ("protein.fa", b">p\nMKVLAEF\n", "protein.fa: record 'p' has 'L' at base 4, .* --alphabet"),
        ("spaced.fa", b">p\nACGT ACGT\n", "spaced.fa: record 'p' has ' ' at base 5"),
    ],
)
def test_what_is_no_fasta_is_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        read(put(tmp_path / name, content))
    assert "\n" not in str(error.value)


def test_a_name_met_in_two_files_is_refused(tmp_path: Path) -> None:
    one, two = put(tmp_path / "1.fa", b">a\nA\n"), put(tmp_path / "2.fa", b">a\nC\n")
    with pytest.raises(DataError, match=r"2\.fa: a second record is named 'a' \(the first is in 1\.fa\)"):
        read(one, two)


def test_paths_that_are_no_files_are_refused_before_any_is_read(tmp_path: Path) -> None:
    good = put(tmp_path / "a.fa", b">a\nA\n")
    with pytest.raises(DataError, match=r"missing.fa: no such file"):
        next(read_records([good, tmp_path / "missing.fa"], Alphabet.named("dna")))
    with pytest.raises(DataError, match="not a file"):
        read(good, tmp_path)
    with pytest.raises(DataError, match="no input files"):
        read()
    with pytest.raises(DataError, match=r"blank.txt: the file is empty"):
        read(put(tmp_path / "blank.txt", b""), alphabet="bytes")
