"""leakage.json is written, read, and not needed."""

from pathlib import Path

from megabase.datamodules.index.leakage import LEAKAGE_NAME, Leakage, read_leakage, write_leakage
from megabase.datamodules.index.store import open_store


def test_what_is_written_is_read(tmp_path: Path) -> None:
    leaks = [Leakage("test", 10, 4), Leakage("valid", 0, 0)]
    assert read_leakage(open_store(tmp_path)) == []
    write_leakage(tmp_path, leaks)
    assert read_leakage(open_store(tmp_path)) == leaks
    assert [leak.share for leak in leaks] == [0.4, 0]
    write_leakage(tmp_path, [])
    assert not list(tmp_path.iterdir())


def test_a_file_of_others_is_ignored(tmp_path: Path) -> None:
    for content in ("", "[1]", "{}", '[{"split": "valid"}]'):
        (tmp_path / LEAKAGE_NAME).write_text(content)
        assert read_leakage(open_store(tmp_path)) == []
