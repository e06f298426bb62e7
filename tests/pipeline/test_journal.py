"""The journal: exact floats, torn lines, resume, and reading while it grows."""

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.journal import Journal, Tail, read


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


def test_resume_drops_later_rows_and_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    first = Journal(path, 0)
    first.append([{"step": step, "loss": step / 7} for step in range(1, 9)])
    with path.open("a") as file:
        file.write('{"step": 9, "lo')
    resumed = Journal(path, 5)
    resumed.append([{"step": 6, "loss": 6 / 7}])
    assert [row["step"] for row in read(path)] == [1, 2, 3, 4, 5, 6]


def test_starting_anew_keeps_nothing(tmp_path: Path) -> None:
    Journal(tmp_path / "m.jsonl", 0).append([{"step": 1}])
    Journal(tmp_path / "m.jsonl", 0)
    assert list(read(tmp_path / "m.jsonl")) == []


def test_tail_returns_each_whole_row_once(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    tail = Tail(path)
    assert tail.new() == []
    with path.open("a") as file:
        file.write('{"step": 1}\n{"step": 2')
        file.flush()
        assert tail.new() == [{"step": 1}]
        file.write('}\n{"step": 3}\n')
        file.flush()
        assert tail.new() == [{"step": 2}, {"step": 3}]
        assert tail.new() == []
