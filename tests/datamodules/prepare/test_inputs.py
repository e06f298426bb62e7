"""Directories, patterns and pipes become files; files with the same record names get prefixes."""

import gzip
import logging
import os
import threading
from pathlib import Path

import pytest

from megabase.datamodules.errors import DataError
from megabase.datamodules.prepare.inputs import check_inputs, expand, pipes_as_files, prefixed, prefixes
from megabase.datamodules.prepare.run import prepare

FASTA = b">one first record\nACGTN\nacgt\n\n>two\r\nGG\r\n>three\n"


def put(path: Path, content: bytes = FASTA) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def test_paths_that_are_no_files_are_refused_before_any_is_read(tmp_path: Path) -> None:
    good = put(tmp_path / "a.fa")
    with pytest.raises(DataError, match=r"missing.fa: no such file"):
        check_inputs([good, tmp_path / "missing.fa"])
    with pytest.raises(DataError, match="neither a file, a directory nor a pipe"):
        check_inputs([good, tmp_path])
    with pytest.raises(DataError, match=r"a.fa: is given twice: give every input once"):
        check_inputs([good, *expand([tmp_path])])
    with pytest.raises(DataError, match="no input files"):
        check_inputs([])


def test_patterns_become_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "more" / "deep.fa").mkdir(parents=True)
    for name in ("b.fa", "a.fa", "c.fq", "more/d.fa", "odd[1].fa"):
        put(tmp_path / name, FASTA)
    monkeypatch.chdir(tmp_path)
    assert expand(["?.fa"]) == [Path("a.fa"), Path("b.fa")]
    assert expand([str(tmp_path / "?.fa")]) == [tmp_path / "a.fa", tmp_path / "b.fa"]
    assert expand(["c.fq", "[ab].fa"]) == [Path("c.fq"), Path("a.fa"), Path("b.fa")]
    assert expand(["**/*.fa"]) == [Path("a.fa"), Path("b.fa"), Path("more/d.fa"), Path("odd[1].fa")]
    assert expand(["odd[1].fa", Path("missing.fa")]) == [Path("odd[1].fa"), Path("missing.fa")]
    assert expand([]) == []
    for pattern in ("*.txt", "more/deep*"):
        with pytest.raises(DataError, match="no file matches this pattern") as error:
            expand(["a.fa", pattern])
        assert pattern in str(error.value)


def test_a_directory_becomes_its_sequence_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in (
        "b.FNA.gz",
        "a.fa",
        "c.faa",
        "README",
        ".hidden.fa",
        "deep/d.fa",
        "reads.fastq.zst",
        "x.gff",
        "y.gff",
    ):
        put(Path("in", name))
    with caplog.at_level(logging.WARNING):
        assert expand(["in", "in/c.faa"]) == [
            Path("in", name) for name in ("a.fa", "b.FNA.gz", "reads.fastq.zst", "c.faa")
        ]
    assert "in: left out README, c.faa, x.gff and 1 more: not sequence files by name" in caplog.text
    assert "in: its directories are left out (deep): a quoted pattern such as 'in/**/*.fa'" in caplog.text
    assert Path("in/c.faa") in expand(["in"], "protein")
    assert len(expand(["in"], "bytes")) == 7
    put(Path("none/deep/d.fa"))
    with pytest.raises(
        DataError, match=r"none: a directory without a file that ends in .fa, .*'none/\*\*/\*.fa'"
    ):
        expand(["none"])


@pytest.mark.parametrize("alphabet", ["dna", "bytes"])
def test_a_shard_set_is_not_taken_as_input(tmp_path: Path, alphabet: str) -> None:
    put(tmp_path / "in.fa")
    prepare([tmp_path / "in.fa"], tmp_path / "shards", jobs=1, progress=False)
    with pytest.raises(DataError, match="shards: holds shards, which are prepared already"):
        expand([tmp_path / "shards"], alphabet)


def test_pipes_are_read_once_and_leave_nothing(tmp_path: Path) -> None:
    def fill(name: str, content: bytes) -> Path:
        os.mkfifo(tmp_path / name)
        threading.Thread(target=(tmp_path / name).write_bytes, args=(content,), daemon=True).start()
        return tmp_path / name

    inputs = [fill("p", gzip.compress(FASTA)), put(tmp_path / "x.fa", b">x\nAC\n"), fill("q", b">y\nGGG\n")]
    index = prepare(inputs, tmp_path / "new" / "out", progress=False, jobs=1)
    assert index.segments.record.tolist() == ["one", "two", "x", "y"]
    assert index.segments.source.tolist() == ["pipe-1", "pipe-1", "x.fa", "pipe-3"]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]
    with pytest.raises(DataError, match=r"pipe-1: not FASTA (?!.*the same command continues)"):
        prepare([fill("r", b"no"), tmp_path / "x.fa"], tmp_path / "new" / "bad", progress=False, jobs=1)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]
    with pipes_as_files([tmp_path / "x.fa"], tmp_path / "none") as files:
        assert files == [tmp_path / "x.fa"] and not (tmp_path / "none").exists()


def test_an_output_that_exists_is_refused_before_a_pipe_is_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "p")  # reading it would wait forever
    (tmp_path / "out").mkdir()
    with pytest.raises(DataError, match="out already exists: delete it or choose another output"):
        prepare([tmp_path / "p"], tmp_path / "out", progress=False)


def test_prefixes_are_as_short_as_they_can_be() -> None:
    paths = [
        Path(name)
        for name in ("/d/x/asm.fa.gz", "/d/y/asm.fa", "/d/y/other.v2.fasta", "/d/z.fa", "/d/z.fa.gz")
    ]
    assert list(prefixes(paths).values()) == ["x/asm", "y/asm", "other.v2", "/d/z.fa", "/d/z.fa.gz"]
    assert prefixed("mm10", Path("mm10.fa.gz"), "chr1") == "mm10.chr1"
    assert prefixed("x/book", Path("x/book.txt.gz"), "book.txt") == "x/book.txt"
    assert prefixed("x/a", Path("x/a.jsonl"), "a.jsonl:7") == "x/a.jsonl:7"


def test_assemblies_with_the_same_record_names_are_told_apart(tmp_path: Path) -> None:
    one, two = put(tmp_path / "s1" / "asm.fa"), put(tmp_path / "s2" / "asm.fa")
    with pytest.raises(
        DataError, match=r"asm.fa: a second record is named 'one' .*: add --prefix-names"
    ) as error:
        prepare([one, two], tmp_path / "out", progress=False, shard_bytes=8, jobs=1)
    assert "continues" not in str(error.value)
    index = prepare(
        [one, two],
        tmp_path / "out",
        progress=False,
        shard_bytes=8,
        jobs=1,
        prefix_names=True,
        valid="s2/asm.one",
    )
    assert index.segments.record.tolist() == ["s1/asm.one", "s1/asm.two", "s2/asm.one", "s2/asm.two"]
    assert index.segments.split.tolist() == ["train", "train", "valid", "train"]
