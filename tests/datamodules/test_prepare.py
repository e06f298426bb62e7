import gzip
from pathlib import Path

import pytest

from datamodules.errors import DataError
from datamodules.prepare import prepare


def test_text_becomes_shards(tmp_path: Path) -> None:
    text = b"In the beginning " * 100
    (tmp_path / "book.txt.gz").write_bytes(gzip.compress(text))
    (tmp_path / "other.txt").write_bytes(text[:50])
    index = prepare(
        [tmp_path / "book.txt.gz", tmp_path / "other.txt"],
        tmp_path / "new" / "out",
        "bytes",
        valid="other.txt",
    )
    assert index.segments.record.tolist() == ["book.txt", "other.txt"]
    assert index.segments.split.tolist() == ["train", "valid"]
    assert index.read(0, 0, len(text)).tobytes() == text
    assert len(index.segments.gaps) == 0


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (b">a\nACGT\n>a\nACGT\n", {}, "a second record is named 'a'"),
        (b">a\nACGT\n", {"valid": "b"}, "--valid 'b' is neither a fraction between 0 and 1 nor a record"),
        (b">a\n>b\n", {}, "hold no base at all"),
        (b">a\nACGT\n", {"alphabet": "rna"}, "unknown alphabet 'rna'"),
        (gzip.compress(b">a\nACGT\n")[:-4], {}, "cut off or damaged"),
    ],
)
def test_bad_input_leaves_no_output(
    tmp_path: Path, content: bytes, options: dict[str, str], message: str
) -> None:
    fasta = tmp_path / "in.fa"
    fasta.write_bytes(content)
    with pytest.raises(DataError, match=message):
        prepare([fasta], tmp_path / "out", progress=False, **options)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == [fasta]


def test_the_bar_reaches_the_input_s_bytes(
    lambda_fasta: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    prepare([lambda_fasta], tmp_path / "out")
    shown = capsys.readouterr()
    assert "Preparing" in shown.err
    assert "15.4/15.4 kB" in shown.err
    assert shown.out == ""
