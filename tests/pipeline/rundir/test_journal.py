"""The journal: exact floats, incomplete lines, resume, and reading while it grows."""

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megabase.pipeline.errors import RunError
from megabase.pipeline.rundir.journal import Journal, Tail, read, read_end, restore


@given(values=st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=20))
def test_floats_read_back_exactly(tmp_path_factory: pytest.TempPathFactory, values: list[float]) -> None:
    path = tmp_path_factory.mktemp("journal") / "metrics.jsonl"
    journal = Journal(path, 0)
    journal.append([{"step": i, "loss": value} for i, value in enumerate(values)])
    journal.close()
    assert [row["loss"] for row in read(path)] == values


def test_not_a_number_is_still_valid_json(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "m.jsonl", 0)
    journal.append([{"step": 1, "loss": math.nan}, {"step": 2, "loss": math.inf}])
    assert [row["loss"] for row in read(tmp_path / "m.jsonl")] == ["nan", "inf"]


def test_resume_drops_later_rows_and_an_incomplete_line(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    first = Journal(path, 0)
    first.append([{"step": step, "loss": step / 7} for step in range(1, 9)])
    with path.open("a") as file:
        file.write('{"step": 9, "lo')
    resumed = Journal(path, 5)
    resumed.append([{"step": 6, "loss": 6 / 7}])
    assert [row["step"] for row in read(path)] == [1, 2, 3, 4, 5, 6]


def test_a_fresh_start_keeps_no_rows(tmp_path: Path) -> None:
    Journal(tmp_path / "m.jsonl", 0).append([{"step": 1}])
    Journal(tmp_path / "m.jsonl", 0)
    assert list(read(tmp_path / "m.jsonl")) == []


def test_a_full_disk_is_one_message_and_closing_adds_none(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "metrics.jsonl", resume_step=0)
    journal.close()
    journal._file = Path("/dev/full").open("a")  # noqa: SIM115
    with pytest.raises(
        RunError,
        match=r"metrics\.jsonl cannot be written: .*No space left.* run it again to begin from step 0",
    ):
        journal.append([{"step": 1, "loss": 2.0}])
    journal.close()


def test_tail_returns_each_complete_row_once(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    tail = Tail(path)
    assert list(tail.new()) == []
    with path.open("a") as file:
        file.write('{"step": 1}\n{"step": 2')
        file.flush()
        assert list(tail.new()) == [{"step": 1}]
        file.write('}\n{"step": 3}\n')
        file.flush()
        assert list(tail.new()) == [{"step": 2}, {"step": 3}]
        assert list(tail.new()) == []


def test_tail_says_when_the_file_was_rewritten(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    assert not tail.was_rewritten()
    Journal(path, 0).append([{"step": 1}, {"step": 2}])
    assert len(list(tail.new())) == 2 and not tail.was_rewritten()
    Journal(path, 1)
    assert tail.was_rewritten()
    path.unlink()
    assert tail.was_rewritten()


def test_rows_of_the_checkpoint_s_copy_are_restored(tmp_path: Path) -> None:
    journal, saved = tmp_path / "metrics.jsonl", tmp_path / "saved.jsonl"
    rows = [b'{"step": 1, "loss": 2.0}\n', b'{"step": 2, "loss": 1.5}\n', b'{"step": 3, "loss": 1.0}\n']
    saved.write_bytes(b"".join(rows[:2]))
    for there, wrong in (
        (rows, None),
        (rows[:2], None),
        (rows[:1], "lacks rows"),
        ([], "lacks rows"),
        ([rows[0], rows[1][:9]], "lacks rows"),
        ([rows[0].replace(b"2.0", b"3.0"), *rows[1:]], "has other rows"),
    ):
        journal.write_bytes(b"".join(there))
        assert restore(journal, saved) == wrong
        assert journal.read_bytes() == b"".join(there if wrong is None else rows[:2])
    journal.unlink()
    assert restore(journal, saved) == "lacks rows" and journal.read_bytes() == saved.read_bytes()


@pytest.mark.parametrize("line", [b"\xff\xfe\n", b"[1]\n", b"null\n", b'{"loss": 1.0}\n', b'{"step": 2'])
def test_a_line_that_is_no_row_ends_a_journal(tmp_path: Path, line: bytes) -> None:
    journal = tmp_path / "metrics.jsonl"
    journal.write_bytes(b'{"step": 1}\n' + line)
    assert list(read(journal)) == [{"step": 1}]


@given(size=st.integers(0, 200), incomplete=st.booleans())
def test_the_end_of_a_journal_is_its_last_complete_rows(
    tmp_path_factory: pytest.TempPathFactory, size: int, incomplete: bool
) -> None:
    path = tmp_path_factory.mktemp("journal") / "metrics.jsonl"
    lines = [
        b'{"step": 1, "loss": 2.0}\n',
        b"[1]\n",
        b"\xff\n",
        *(b'{"step": %d}\n' % n for n in range(2, 9)),
    ]
    path.write_bytes(b"".join(lines) + b'{"step": 9' * incomplete)
    whole = [row for row in read(path) if row["step"] == 1] + [{"step": n} for n in range(2, 9)]
    rows = read_end(path, size)
    assert rows == whole[len(whole) - len(rows) :]
    assert len(rows) >= min(size // 25 - 1, 7)
    assert read_end(path.with_name("none"), size) == []
