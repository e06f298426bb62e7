import bz2
import gzip
import io
import json
import lzma
import random
import struct
import subprocess
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megabase.datamodules.alphabet import Alphabet
from megabase.datamodules.errors import DataError
from megabase.datamodules.prepare.inputs import check_inputs
from megabase.datamodules.prepare.records import Names, check_compression, read_file

FASTA = b">one first record\nACGTN\nacgt\n\n>two\r\nGG\r\n>three\n"
FASTQ = b"@one first read\nACGTN\n+\nIIIII\n@two\r\nGG\r\n+two\r\nII\r\n"
JSONL = (
    b'{"id": "one", "text": "ACGT"}\n\n{"name": "two", "text": "gg"}\r\n{"text": "", "id": 7}\n{"text": "N"}'
)
# A block of bgzip carries its own size less one in an extra field "BC" of its header.
BGZIP_END = bytes.fromhex("1f8b08040000000000ff0600424302001b0003000000000000000000")


def read(*paths: Path, alphabet: str = "dna", field: str = "text") -> list[tuple[str, str, bytes]]:
    """Every record of every file, as `prepare` reads them."""
    check_inputs(paths)
    found, names = [], Names()
    for path in paths:
        for record in read_file(path, Alphabet.named(alphabet), field=field):
            names.add(record.name, str(path), str(path))
            found.append((record.name, record.description, record.sequence))
    return found


def put(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def bgzip(content: bytes, block: int = 20) -> bytes:
    """As bgzip writes: many small gzip members, each with its size in the header, and an empty one."""
    blocks = []
    for start in range(0, len(content), block):
        member = gzip.compress(content[start : start + block], mtime=0)
        size = struct.pack("<H", len(member) + 8 - 1)
        blocks.append(member[:3] + b"\x04" + member[4:10] + b"\x06\x00BC\x02\x00" + size + member[10:])
    return b"".join(blocks) + BGZIP_END


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def pzstd(content: bytes) -> bytes:
    """As pzstd writes: before every frame one to skip that holds its size."""
    frames = [zstd(content[start : start + 20]) for start in range(0, len(content), 20)]
    return b"".join(struct.pack("<4sII", b"\x50\x2a\x4d\x18", 4, len(frame)) + frame for frame in frames)


COMPRESSIONS = {
    "plain": bytes,
    "gzip": gzip.compress,
    "bgzip": bgzip,
    "zstd": zstd,
    "pzstd": pzstd,
}


def test_fasta_is_read_unchanged(tmp_path: Path) -> None:
    expected = [("one", "first record", b"ACGTNacgt"), ("two", "", b"GG"), ("three", "", b"")]
    assert read(put(tmp_path / "a.fa", FASTA)) == expected


def test_fastq_is_read_without_qualities(tmp_path: Path) -> None:
    expected = [("one", "first read", b"ACGTN"), ("two", "", b"GG")]
    assert read(put(tmp_path / "a.fa", FASTQ)) == expected  # told by content


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.jsonl.gz", "A.JSONL"])
def test_jsonl_is_one_record_a_line(tmp_path: Path, name: str) -> None:
    plain = name.removesuffix(".gz")
    expected = [("one", "", b"ACGT"), ("two", "", b"gg"), ("7", "", b""), (f"{plain}:5", "", b"N")]
    assert read(put(tmp_path / name, JSONL)) == expected
    assert read(put(tmp_path / name, JSONL), alphabet="bytes") == expected


def test_jsonl_holds_any_text_in_any_field(tmp_path: Path) -> None:
    text = "naïve\n\u2028 𝄞\0"
    lines = "\n".join(json.dumps({"body": text, "id": number}) for number in range(3)).encode()
    assert read(put(tmp_path / "a.jsonl", lines), alphabet="bytes", field="body") == [
        (str(number), "", text.encode()) for number in range(3)
    ]


@pytest.mark.parametrize("form", COMPRESSIONS)
@pytest.mark.parametrize("content", [FASTA, FASTQ])
@pytest.mark.parametrize("name", ["a.fa.gz", "a.zst", "a"])
def test_compression_is_told_by_content_not_by_name(
    tmp_path: Path, name: str, form: str, content: bytes
) -> None:
    packed = put(tmp_path / name, COMPRESSIONS[form](content))
    assert read(packed) == read(put(tmp_path / "plain", content))


@given(content=st.binary(min_size=1, max_size=200), form=st.sampled_from(sorted(COMPRESSIONS)))
def test_any_bytes_come_back_from_any_compression(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, form: str
) -> None:
    path = put(tmp_path_factory.mktemp("bytes") / "a.txt", COMPRESSIONS[form](b"In " + content))
    assert read(path, alphabet="bytes") == [("a.txt", "", b"In " + content)]


def test_genome_is_read_from_every_compression(
    lambda_fasta: Path, lambda_bases: bytes, tmp_path: Path
) -> None:
    name = "gi|9626243|ref|NC_001416.1|"
    expected = [(name, "Enterobacteria phage lambda, complete genome", lambda_bases)]
    content = gzip.decompress(lambda_fasta.read_bytes())
    assert read(lambda_fasta) == expected
    assert read(put(tmp_path / "a", bgzip(content, 0xFF00 // 8))) == expected
    assert read(put(tmp_path / "a", zstd(content))) == expected
    assert len(lambda_bases) == 48_502


@pytest.mark.parametrize("suffix", ["", ".gz", ".bgz", ".zst"])
def test_a_text_file_is_one_record(tmp_path: Path, suffix: str) -> None:
    text = ">no FASTA\nnaïve\r\n".encode() + bytes(range(256))
    packed = {"": bytes, ".gz": gzip.compress, ".bgz": bgzip, ".zst": zstd}[suffix](text)
    assert read(put(tmp_path / f"a.txt{suffix}", packed), alphabet="bytes") == [("a.txt", "", text)]


def test_records_are_streamed(tmp_path: Path) -> None:
    """The first record is returned before the second is read."""
    records = read_file(put(tmp_path / "a.fa", b">one\nAC\n>two\n!!\n"), Alphabet.named("dna"))
    assert next(records).name == "one"
    with pytest.raises(DataError):
        next(records)


class Counted(io.FileIO):
    """Counts the bytes that are read from a file."""

    count = 0

    def read(self, size: int | None = -1, /) -> bytes:
        content = super().read(size)
        self.count += len(content)
        return content

    def readinto(self, buffer: Any, /) -> int:
        size = super().readinto(buffer)
        self.count += size
        return size


@pytest.mark.parametrize("form", COMPRESSIONS)
def test_opener_of_the_caller_reads_every_byte(tmp_path: Path, form: str) -> None:
    path = put(tmp_path / "a", COMPRESSIONS[form](FASTA * 2))
    file = Counted(path)
    records = read_file(path, Alphabet.named("dna"), lambda _: file)
    assert sum(1 for _ in records) == 6  # names that occur twice are for the caller to find
    assert file.count == path.stat().st_size
    assert file.closed


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.fa", b"", "empty.fa: the file holds no FASTA record"),
        ("blank.fa", b"\n\n", "blank.fa: the file holds no FASTA record"),
        ("none.fa.gz", gzip.compress(b"", mtime=0), "none.fa.gz: the file holds no FASTA record"),
        ("none.fa.zst", zstd(b""), "none.fa.zst: the file holds no FASTA record"),
        ("page.html", b"<html>404</html>", "page.html: not FASTA .*Expected '>'"),
        ("bare.txt", b"ACGTACGT\n", "bare.txt: not FASTA"),
        ("image.fa", b">\xff\xfe\x00\x80", "image.fa: not FASTA"),
        ("lines.fq", b"@r\nAC\nGT\n+\nIIII\n", r"lines.fq: not FASTQ .*line 3.*'\+'"),
        ("short.fq", b"@r\nACGT\n+\nIII\n", "short.fq: not FASTQ .*qualities differ"),
        ("cut.fq", FASTQ + b"@three\nAC", "cut.fq: not FASTQ .*Premature end"),
        ("tail.fq", FASTQ + b"\n\n", "tail.fq: not FASTQ"),
        ("mixed.fq", FASTQ + FASTA, "mixed.fq: not FASTQ"),
        ("nameless.fq", b"@\nACGT\n+\nIIII\n", "nameless.fq: a record has no name: every '@'"),
        ("twice.fa", b">a\nA\n>b\nA\n>a\nC\n", "twice.fa: a second record is named 'a' .the first is in .*twice"),
        ("nameless.fa", b"> a\nACGT\n", "nameless.fa: a record has no name: every '>'"),
        ("protein.fa", b">p\nMKVLAEF\n", "protein.fa: record 'p' has 'L' at base 4, .* --alphabet"),
        ("spaced.fa", b">p\nACGT ACGT\n", "spaced.fa: record 'p' has ' ' at base 5"),
        ("odd.fq", b"@p\nAC!T\n+\nIIII\n", "odd.fq: record 'p' has '!' at base 3"),
        ("empty.jsonl", b"\n \n", "empty.jsonl: the file holds no line of JSON"),
        ("cut.jsonl", JSONL + b'\n{"text": "AC', "cut.jsonl: line 6: not JSON .Unterminated .*at character 10"),
        ("pretty.jsonl", b'{\n"text": "A"\n}', "pretty.jsonl: line 1: not JSON"),
        ("deep.jsonl", b"[" * 100_000, "deep.jsonl: line 1: not JSON"),
        ("latin.jsonl", b'{"text": "\xe9"}', "latin.jsonl: line 1: not JSON .*utf-8"),
        ("list.jsonl", b'\n["ACGT"]', "list.jsonl: line 2: list, not an object"),
        ("none.jsonl", b'{"seq": "A", "n": 1}', "none.jsonl: line 1: no field 'text' .*'seq', 'n'.: .*--field"),
        ("number.jsonl", b'{"text": 3}', "number.jsonl: line 1: field 'text' is int, it must be a string"),
        ("null.jsonl", b'{"text": null}', "null.jsonl: line 1: field 'text' is NoneType, it must be a string"),
        ("half.jsonl", b'{"text": "\\ud83d"}', "half.jsonl: line 1: field 'text' is not valid text"),
        ("name.jsonl", b'{"text": "A", "id": "\\ud83d"}', "name.jsonl: line 1: field 'id' is not valid text"),
        ("twice.jsonl", b'{"id":1,"text":"A"}\n{"id":"1","text":"A"}', "twice.jsonl: a second record is named '1'"),
        ("odd.jsonl", '{"id":"é","text":"Aé"}'.encode(), "odd.jsonl: record 'é' has 'Ã' at base 2"),
    ],
)  # fmt: skip
def test_unreadable_files_are_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        read(put(tmp_path / name, content))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("form", ["gzip", "bgzip", "zstd", "pzstd"])
@pytest.mark.parametrize("alphabet", ["dna", "bytes"])
def test_compressed_data_cut_anywhere_is_refused(tmp_path: Path, form: str, alphabet: str) -> None:
    whole = COMPRESSIONS[form](FASTA)
    for kept in range(4, len(whole)):
        if form == "pzstd" and kept in pzstd_ends():
            continue  # the format itself cannot tell
        path = put(tmp_path / "cut", whole[:kept])
        with pytest.raises(
            DataError, match=r"cut: the \w+ data is cut off or damaged .*: copy the file again"
        ):
            read(path, alphabet=alphabet)


def pzstd_ends() -> set[int]:
    """Where a frame ends, or the frame to skip before it does."""
    ends = {len(pzstd(FASTA[:end])) for end in range(0, len(FASTA), 20)}
    return ends | {end + 12 for end in ends}


# Cannot be compressed. The same in every process, because a test's name contains it.
NOISE = random.Random(0).randbytes(999)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(FASTA, mtime=0)[:-8] + bytes(8), "the gzip data is cut off or damaged .CRC check failed"),
        (gzip.compress(FASTA, mtime=0) + b"more", "the gzip data is cut off or damaged"),
        (gzip.compress(NOISE, mtime=0)[:-400] + bytes(400), "the gzip data is cut off or damaged"),
        (bgzip(FASTA)[: -len(BGZIP_END)], "the bgzip data is cut off or damaged .bgzip's last block is missing"),
        (zstd(FASTA)[:6] + b"\xff" + zstd(FASTA)[7:], "the zstd data is cut off or damaged"),
        (zstd(FASTA) + b"more", "the zstd data is cut off or damaged"),
    ],
)  # fmt: skip
def test_damaged_compressed_data_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=rf"in.txt: {message}") as error:
        read(put(tmp_path / "in.txt", content), alphabet="bytes")
    assert "\n" not in str(error.value)


def test_an_empty_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"blank.txt: the file is empty"):
        read(put(tmp_path / "blank.txt", b""), alphabet="bytes")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("my reads.fa.gz", b">a x\nAC\n>a\nGT\n"),
        ("a.fa", b">a\nAC\n>a\nGT\n"),
        ("r.fastq", b"@a\nAC\n+\n@@\n@a\nGT\n+\n@@\n"),
    ],
)
def test_the_command_for_a_name_that_occurs_twice_works(tmp_path: Path, name: str, content: bytes) -> None:
    path = put(tmp_path / name, gzip.compress(content) if name.endswith(".gz") else content)
    with pytest.raises(DataError, match="a second record is named 'a'") as error:
        read(path)
    subprocess.run(["bash", "-c", str(error.value).split("`")[1]], check=True)
    made = next(path for path in tmp_path.iterdir() if "numbered" in path.name)
    assert [(name, bases) for name, _, bases in read(made)] == [("1.a", b"AC"), ("2.a", b"GT")]


def test_json_lines_are_told_by_their_brace_where_it_is_no_sequence(tmp_path: Path) -> None:
    assert read(put(tmp_path / "pipe-1", JSONL))[0] == ("one", "", b"ACGT")
    assert read(put(tmp_path / "pipe-2", JSONL), alphabet="bytes") == [("pipe-2", "", JSONL)]


def test_name_in_two_files_is_refused(tmp_path: Path) -> None:
    one, two = put(tmp_path / "1.fa", b">a\nA\n"), put(tmp_path / "2.fa", b">a\nC\n")
    with pytest.raises(
        DataError,
        match=r"2\.fa: a second record is named 'a' \(the first is in .*1\.fa\): add --prefix-names",
    ):
        read(one, two)


def test_different_names_are_never_confused() -> None:
    names = Names()
    for number in range(100_000):
        names.add(f"read/{number}", "a.fq", "here")
    with pytest.raises(DataError, match=r"here: a second record is named 'read/5' \(the first is in a.fq\)"):
        names.add("read/5", "b.fq", "here")


@pytest.mark.parametrize(("module", "name"), [(bz2, "bzip2"), (lzma, "xz")])
def test_other_compressions_are_refused_by_name(tmp_path: Path, module: Any, name: str) -> None:
    path = tmp_path / "a.fa"
    path.write_bytes(module.compress(b">a\nACGT\n"))
    with pytest.raises(
        DataError, match=f"a.fa: {name} is not supported: decompress it, or use gzip, bgzip or zstd"
    ):
        check_compression(path)
