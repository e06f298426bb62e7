"""Tars that others wrote: what is read back through the index is what was put in, and all else is refused."""

import gzip
import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st

from megabase.datamodules.errors import DataError
from megabase.datamodules.index.index_file import INDEX_NAME
from megabase.datamodules.index.shard_index import ShardIndex
from megabase.datamodules.prepare.foreign import index_tars
from megabase.datamodules.prepare.run import prepare

BASES = "ACGTNacgt"


def npy(array: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def put(path: Path, members: dict[str, bytes]) -> Path:
    """A tar of plain files."""
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def in_lines(bases: bytes, width: int, end: bytes = b"\n") -> bytes:
    return b"".join(bases[at : at + width] + end for at in range(0, len(bases), width))


def whole(index: ShardIndex) -> dict[str, bytes]:
    """Every record, put together from its segments."""
    segments, records = index.segments, {}
    for row in range(len(segments)):
        name = segments.record[row]
        assert segments.start[row] == len(records.setdefault(name, b""))
        records[name] += index.read(row, 0, int(segments.length[row])).tobytes()
        index.verify_row(row)
    return records


def index(directory: Path, **options: Any) -> ShardIndex:
    return index_tars(directory, progress=False, **options)


def test_what_webdataset_writes_is_read(tmp_path: Path) -> None:
    with webdataset.TarWriter(str(tmp_path / "one.tar")) as writer:
        writer.write({"__key__": "a", "seq": b"ACGTACGTNN", "json": {"source": "first.fa", "label": 3}})
        writer.write({"__key__": "dir/b", "txt": "acgtr", "cls": 7})
    with webdataset.TarWriter(str(tmp_path / "two.tar")) as writer:
        writer.write({"__key__": "c", "npy": np.frombuffer(b"GATTACA", np.uint8)})
        writer.write({"__key__": "d", "fasta": b">x some\nACGT\nAC\n>y\nTTTTT\n", "json": ["no object"]})
    made = index(tmp_path, valid="y", test=0.5)
    assert whole(made) == {
        "a": b"ACGTACGTNN",
        "dir/b": b"acgtr",
        "c": b"GATTACA",
        "x": b"ACGTAC",
        "y": b"TTTTT",
    }
    segments = made.segments
    assert segments.source.tolist() == ["first.fa"] * 2 + ["one.tar"] * 2 + ["two.tar"] * 5
    assert segments.split.tolist() == ["train", "test"] * 4 + ["valid"]
    assert segments.gaps.tolist() == [[3, 2], [1, 1]]  # NN of a, r of b
    assert made.sizes == {name: (tmp_path / name).stat().st_size for name in ("one.tar", "two.tar")}
    assert sorted(path.name for path in tmp_path.iterdir()) == [INDEX_NAME, "one.tar", "two.tar"]


lines = st.tuples(
    st.text(BASES, min_size=0, max_size=300).map(str.encode),
    st.integers(1, 70),
    st.sampled_from([b"\n", b"\r\n"]),
    st.booleans(),
)


@pytest.mark.slow
@given(records=st.lists(lines, min_size=1, max_size=4), data=st.data())
def test_every_range_of_a_fasta_member_is_what_was_written(
    tmp_path_factory: pytest.TempPathFactory,
    records: list[tuple[bytes, int, bytes, bool]],
    data: st.DataObject,
) -> None:
    tmp_path, content = tmp_path_factory.mktemp("fasta"), b""
    for number, (bases, width, end, blank) in enumerate(records):
        content += b">r%d text" % number + end + in_lines(bases, width, end) + (end if blank else b"")
    if data.draw(st.booleans(), label="no line end at the end"):
        content = content.rstrip()
    put(tmp_path / "a.tar", {"more.fa": b">more\nACGT\n", "all.fna": content, "odd.json": b"{}"})
    valid = data.draw(st.sampled_from([None, 0.3, 0.7]), label="valid")
    made = index(tmp_path, valid=valid)
    expected = {f"r{number}": bases for number, (bases, *_) in enumerate(records)} | {"more": b"ACGT"}
    assert whole(made) == {name: bases for name, bases in expected.items() if bases}
    segments = made.segments
    for row in range(len(segments)):
        length = int(segments.length[row])
        start = data.draw(st.integers(0, length), label="start")
        count = data.draw(st.integers(0, length - start), label="count")
        first = int(segments.start[row]) + start
        assert made.read(row, start, count).tobytes() == expected[segments.record[row]][first : first + count]


def test_long_members_of_every_kind(tmp_path: Path, lambda_bases: bytes) -> None:
    """Across many checksum blocks and lines."""
    generator = np.random.default_rng(1)
    put(
        tmp_path / "a.tar",
        {
            "seq.seq": lambda_bases,
            "txt.txt": lambda_bases + b"\n",
            "npy.npy": npy(np.frombuffer(lambda_bases, np.uint8)),
            "s1.npy": npy(np.frombuffer(lambda_bases, "S1")),
            "fasta.fa": b">fasta\n" + in_lines(lambda_bases, 61) + b">one\n" + lambda_bases + b"\n",
        },
    )
    made = index(tmp_path, valid=0.25)
    assert whole(made) == dict.fromkeys(["seq", "txt", "npy", "s1", "fasta", "one"], lambda_bases)
    rows = made.segments.rows_of("valid")
    assert set(made.segments.start[rows]) == {36_376}  # also where that is no line's start
    for row in rows:
        for _ in range(50):
            start, stop = sorted(generator.integers(0, made.segments.length[row] + 1, 2).tolist())
            read = made.read(row, start, stop - start).tobytes()
            assert read == lambda_bases[36_376 + start : 36_376 + stop]
    assert made.segments.line_bases.tolist() == [0] * 8 + [61, 61, 0, 0]
    assert made.segments.line_bytes.tolist() == [0] * 8 + [62, 62, 0, 0]


def test_shards_of_prepare_have_the_index_of_prepare(
    gappy_records: dict[str, bytes], write_fasta: Callable[[Path, dict[str, bytes]], Path], tmp_path: Path
) -> None:
    fasta = write_fasta(tmp_path / "gappy.fa", gappy_records)
    splits = {"valid": 0.2, "test": "r3"}
    ours = prepare([fasta], tmp_path / "ours", shard_bytes=8192, progress=False, **splits)
    (tmp_path / "theirs").mkdir()
    for tar in (tmp_path / "ours").glob("*.tar"):
        shutil.copy(tar, tmp_path / "theirs")
    made = index(tmp_path / "theirs", **splits)
    assert made.sizes == ours.sizes
    assert made.alphabet is ours.alphabet
    assert made.segments.identity == ours.segments.identity
    for column, values in vars(ours.segments).items():
        if isinstance(values, np.ndarray):
            assert np.array_equal(getattr(made.segments, column), values), column


def test_a_bed_file_cuts_records_where_it_says(tmp_path: Path, lambda_bases: bytes) -> None:
    """Not where lines end: no base may be seen by two splits."""
    (tmp_path / "in").mkdir()
    put(tmp_path / "in" / "a.tar", {"a.fa": b">a\n" + in_lines(lambda_bases, 60), "b.seq": b"ACGT"})
    bed = tmp_path / "split.bed"
    bed.write_text("a\t10\t1000\ttrain\na\t1001\t2003\tvalid\na\t2003\t40000\ttrain\nb\t0\t4\ttrain\n")
    made = index(tmp_path / "in", intervals=bed)
    segments = made.segments
    assert whole(made) == {"a": lambda_bases, "b": b"ACGT"}
    assert segments.split.tolist() == ["train", "valid", "train", "train"]
    starts = np.repeat(segments.start, np.diff(segments.interval_bounds))
    first = segments.intervals[:, 0] + starts
    assert [*zip(first.tolist(), segments.intervals[:, 1].tolist(), strict=True)] == [
        (10, 990),
        (1001, 1002),
        (2003, 37997),
        (0, 4),
    ]


def test_text_keeps_its_line_ends(tmp_path: Path) -> None:
    put(tmp_path / "a.tar", {"a.txt": "naïve\r\n".encode(), "b.seq": bytes(range(256)), "c.TXT": b"\n"})
    assert whole(index(tmp_path, alphabet="bytes")) == {
        "a": "naïve\r\n".encode(),
        "b": bytes(range(256)),
        "c": b"\n",
    }


def test_members_without_a_sequence_are_ignored(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("not a tar")
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for path, content in (
            ("./deep.er/a.b.seq", b"ACGT"),
            ("./deep.er/._a.b.seq", b"\0\5\x16\7"),
            ("./deep.er/a.json", b"not read: no member a.seq"),
            ("./x.jpg", b"\xff"),
            ("./é" + "long" * 40 + ".seq", b"AC"),
        ):
            info = tarfile.TarInfo(path)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        folder = tarfile.TarInfo("folder.seq")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    put(tmp_path / "empty.tar", {})
    assert whole(index(tmp_path)) == {"deep.er/a.b": b"ACGT", "é" + "long" * 40: b"AC"}


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({}, "no member of its tars ends in .seq .txt .fasta .fa .fna .npy"),
        ({"a.jpg": b"\xff"}, "no member of its tars ends in"),
        ({"a.seq": b""}, "no base is left to train on"),
        ({"a.seq": b"AC!T"}, "a.tar: member a.seq: record 'a' has '!' at base 3"),
        ({"a.seq": b"AC\nT"}, r"a.tar: member a.seq: record 'a' has '\\n' at base 3"),
        ({"a.npy": npy(np.arange(4, dtype=np.uint8))}, r"member a.npy: record 'a' has '\\x00' at base 1"),
        ({"a.npy": npy(np.zeros((2, 2), np.uint8))}, r"member a.npy: uint8 of shape \(2, 2\): it must be"),
        ({"a.npy": npy(np.zeros(4, np.int64))}, r"member a.npy: int64 of shape \(4,\): it must be"),
        ({"a.npy": npy(np.array(["A", "C"]))}, "member a.npy: <U1 of shape"),
        ({"a.npy": npy(np.frombuffer(b"ACGT", np.uint8))[:-1]}, "member a.npy: 3 bytes for 4 elements"),
        ({"a.npy": b"ACGT"}, "member a.npy: not a numpy array"),
        ({"a.npy": npy(np.array([None]))}, "member a.npy: object of shape"),
        ({"a.fa": b"ACGT\n"}, "member a.fa: not FASTA: it must begin with '>'"),
        ({"a.fa": b""}, "member a.fa: not FASTA"),
        ({"a.fa": b"> a\nACGT\n"}, "member a.fa: a record has no name"),
        ({"a.fa": b">a\nACGT\n>\nA\n"}, "member a.fa: a record has no name"),
        (
            {"a.fa": b">a\nAC\nACGT\n"},
            "member a.fa: record 'a' has lines of different width.*`megabase prepare`",
        ),
        ({"a.fa": b">a\nACGT\nAC\nACGT\n"}, "member a.fa: record 'a' has lines of different width"),
        ({"a.fa": b">a\nACGT\nACG\nA\n"}, "member a.fa: record 'a' has lines of different width"),
        ({"a.fa": b">a\nACGT\r\nACGT\nAC\n"}, "member a.fa: record 'a' has lines of different width"),
        ({"a.fa": b">a\n\nACGT\n"}, "member a.fa: record 'a' has lines of different width"),
        ({"a.fa": b">a\nACGT\n\nACGT\n"}, "member a.fa: record 'a' has lines of different width"),
        ({"a.fa": b">a\nAC\nGT\n>b\nA T\n"}, "member a.fa: record 'b' has ' ' at base 2"),
        ({"a.fa": b">x\nA\n", "b.fa": b">x\nA\n"}, "member b.fa: a second record is named 'x' .* a.tar"),
        ({"a.seq": b"A", "a.txt": b"A"}, "member a.txt: a second record is named 'a'"),
        ({"a.seq": b"A", "a.json": b"{"}, "member a.seq: its .json is damaged"),
        ({"a.seq": b"A", "a.json": b'{"record": "\\ud83d"}'}, "member a.seq: its .json is damaged"),
        ({"\udce9.seq": b"A"}, r"member '\\udce9.seq': its name is not UTF-8"),
        ({"a.seq.gz": b"A"}, "member a.seq.gz: a compressed member cannot be read by byte range"),
    ],
)
def test_members_that_cannot_be_read_by_range_are_refused(
    tmp_path: Path, members: dict[str, bytes], message: str
) -> None:
    put(tmp_path / "a.tar", members)
    with pytest.raises(DataError, match=message) as error:
        index(tmp_path)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]


def test_a_name_in_two_tars_is_refused(tmp_path: Path) -> None:
    put(tmp_path / "a.tar", {"x.seq": b"A"})
    put(tmp_path / "b.tar", {"x.seq": b"A"})
    with pytest.raises(DataError, match=r"b\.tar: member x\.seq: a second record is named 'x' .*a\.tar"):
        index(tmp_path)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_links_are_refused(tmp_path: Path, kind: bytes) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        info = tarfile.TarInfo("a.seq")
        info.type, info.linkname = kind, "b.seq"
        tar.addfile(info)
    with pytest.raises(DataError, match=r"member a\.seq: a link or a sparse file"):
        index(tmp_path)


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz", "a.tar"])
def test_compressed_tars_are_refused(tmp_path: Path, name: str) -> None:
    put(tmp_path / "good.tar", {"x.seq": b"A"})
    (tmp_path / name).write_bytes(gzip.compress(put(tmp_path / "in", {"y.seq": b"A"}).read_bytes()))
    with pytest.raises(DataError, match=rf"{name}: a compressed tar cannot be read by byte range"):
        index(tmp_path)


def test_a_tar_cut_off_or_damaged_anywhere_is_refused(tmp_path: Path) -> None:
    """But for a tar cut where one of its members ends, which is a tar."""
    content = put(tmp_path / "a.tar", {"x.seq": b"A" * 600, "y.seq": b"C" * 10}).read_bytes()[: 5 * 512]
    for kept in range(0, len(content), 100):
        if kept not in (0, 3 * 512):
            (tmp_path / "a.tar").write_bytes(content[:kept])
            with pytest.raises(
                DataError, match=r"a\.tar: not a tar, cut off or damaged \(.*: copy the file again"
            ):
                index(tmp_path)
    for at in (0, 3 * 512):
        broken = content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
        (tmp_path / "a.tar").write_bytes(broken)
        with pytest.raises(DataError, match=r"a\.tar: not a tar, cut off or damaged"):
            index(tmp_path)


def test_impossible_directories_and_splits_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="missing: no such directory"):
        index(tmp_path / "missing")
    with pytest.raises(DataError, match=r"no \*\.tar in it"):
        index(tmp_path)
    put(tmp_path / "a.tar", {"x.seq": b"ACGT"})
    with pytest.raises(DataError, match="no record is named 'y'"):
        index(tmp_path, valid="y")
    with pytest.raises(DataError, match="no base is left to train on"):
        index(tmp_path, valid="x")
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]


def test_an_index_is_never_overwritten(tmp_path: Path) -> None:
    put(tmp_path / "a.tar", {"x.seq": b"ACGT"})
    index(tmp_path)
    before = (tmp_path / INDEX_NAME).read_bytes()
    with pytest.raises(DataError, match=r"index\.parquet: exists already: remove it to index the tars again"):
        index(tmp_path)
    assert (tmp_path / INDEX_NAME).read_bytes() == before
    (tmp_path / INDEX_NAME).unlink()
    index(tmp_path)
    assert (tmp_path / INDEX_NAME).read_bytes() == before


def test_the_bar_reaches_the_tars_bytes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    put(tmp_path / "a.tar", {"x.seq": b"ACGT"})
    index_tars(tmp_path)
    shown = capsys.readouterr()
    assert "Indexing" in shown.err
    assert "10.2/10.2 kB" in shown.err
    assert shown.out == ""


def test_json_names_a_record_and_its_source(tmp_path: Path) -> None:
    about = {"record": "chr1", "source": "genome.fa", "description": "x"}
    put(tmp_path / "a.tar", {"0.json": json.dumps(about).encode(), "0.seq": b"ACGT", "1.seq": b"AC"})
    made = index(tmp_path)
    assert made.segments.record.tolist() == ["chr1", "1"]
    assert made.segments.source.tolist() == ["genome.fa", "a.tar"]
