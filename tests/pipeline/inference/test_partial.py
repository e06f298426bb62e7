"""Results in parts: continuing, sharing among processes, and what a rank of a job array takes."""

import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megabase.datamodules.prepare.portions import Portion
from megabase.pipeline.errors import RunError, UserError
from megabase.pipeline.inference.partial import (
    WHOLE,
    Partial,
    check_beside,
    grouped,
    is_finished,
    parse_portion,
)

CALL = {"model": "m"}
SIZES = {"a": 5, "b": 1, "c": 3, "d": 3}


def join(partial: Partial) -> bool:
    """Write the names in all tasks."""
    return partial.publish(
        (
            partial.output,
            lambda path: path.write_text("".join(partial.read(name).read_text() for name in SIZES)),
        )
    )


def test_processes_share_the_tasks_and_the_last_one_writes(tmp_path: Path) -> None:
    output = tmp_path / "new" / "out"
    partials = [Partial.open(output, CALL, SIZES, Portion(number, 2)) for number in (1, 2)]
    assert [partial.todo() for partial in partials] == [["a", "b"], ["c", "d"]]
    for name in ("a", "b"):
        partials[0].add(name, lambda path, name=name: path.write_text(name))
    assert not partials[0].is_complete()
    partials[1].add("c", lambda path: path.write_text("c"))
    again = Partial.open(output, CALL, SIZES, Portion(2, 2))  # after a kill
    assert again.todo() == ["d"]
    again.add("d", lambda path: path.write_text("d"))
    assert again.is_complete() and partials[0].is_complete()
    assert join(again) and output.read_text() == "abcd"
    assert not join(partials[0])  # the other one was faster
    assert [path.name for path in output.parent.iterdir()] == ["out"]
    assert is_finished(output, Portion(2, 2))
    with pytest.raises(UserError, match=r"out exists: remove it, or choose another --output"):
        is_finished(output, WHOLE)


def test_a_process_that_starts_while_the_output_is_published_does_nothing(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.touch()  # after this process has seen that there is none
    late = Partial.open(output, CALL, SIZES, Portion(1, 2))
    assert late.todo() == [] and not late.is_complete()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_is_written_beside_the_output_survives_a_kill_and_a_second_process(tmp_path: Path) -> None:
    output, beside = tmp_path / "out", tmp_path / "out.tracks"

    def directory(path: Path) -> None:
        path.mkdir()
        (path / "track").write_text("1")

    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    partial = Partial.open(output, CALL, SIZES)
    with pytest.raises(KeyboardInterrupt):
        partial.publish((beside, directory), (output, killed))
    check_beside(output, beside)
    partials = [Partial.open(output, CALL, SIZES, Portion(number, 2)) for number in (1, 2)]

    def slow(path: Path) -> None:  # the other process writes both meanwhile
        directory(path)
        partials[1].publish((beside, directory), (output, lambda path: path.write_text("2")))

    (beside / "track").unlink()
    beside.rmdir()
    assert not partials[0].publish((beside, slow), (output, lambda path: path.write_text("1")))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.tracks"]
    assert output.read_text() == "2" and [path.name for path in beside.iterdir()] == ["track"]
    output.unlink()
    with pytest.raises(UserError, match=r"out\.tracks exists, which is written too"):
        check_beside(output, beside)


def test_a_directory_of_another_call_is_refused(tmp_path: Path) -> None:
    Partial.open(tmp_path / "out", CALL, SIZES)
    with pytest.raises(UserError, match=r"out\.partial was left by a call with another model"):
        Partial.open(tmp_path / "out", {"model": "n"}, SIZES)


def test_a_result_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    partial = Partial.open(tmp_path / "out", CALL, SIZES)

    def full(path: Path) -> None:
        path.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(RunError, match=r"out: cannot be written: .*No space left"):
        partial.add("a", full)
    assert [path.name for path in partial.directory.iterdir()] == ["call.json"]
    assert partial.todo() == list(SIZES)
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="cannot be written"):
        Partial.open(tmp_path / "file" / "out", CALL, SIZES)


@pytest.mark.parametrize(
    ("environment", "portion"),
    [
        ("", "1/1"),
        ("SLURM_PROCID=0 SLURM_NTASKS=4", "1/1"),  # a shell of salloc
        ("RANK=2 WORLD_SIZE=8 LOCAL_RANK=2", "3/8"),
        ("SLURM_STEP_ID=0 SLURM_PROCID=1 SLURM_NTASKS=6 SLURM_STEP_NUM_TASKS=4", "2/4"),
        ("SLURM_ARRAY_TASK_ID=7 SLURM_ARRAY_TASK_MIN=5 SLURM_ARRAY_TASK_MAX=9 SLURM_ARRAY_TASK_COUNT=5", "3/5"),
        (
            "SLURM_ARRAY_TASK_ID=1 SLURM_ARRAY_TASK_MIN=0 SLURM_ARRAY_TASK_MAX=2 SLURM_ARRAY_TASK_COUNT=3 "
            "SLURM_STEP_ID=0 SLURM_PROCID=1 SLURM_NTASKS=2",
            "4/6",
        ),
    ],
)  # fmt: skip
def test_the_portion_of_a_rank(environment: str, portion: str) -> None:
    known = dict(text.split("=") for text in environment.split())
    assert parse_portion("auto", known) == Portion.parse(portion)
    assert parse_portion("2/3", known) == Portion(2, 3)
    assert parse_portion(None, known) == WHOLE


def test_an_array_with_gaps_is_refused() -> None:
    names = ("ID=4", "MIN=0", "MAX=4", "COUNT=3")
    known = dict(f"SLURM_ARRAY_TASK_{name}".split("=") for name in names)
    with pytest.raises(UserError, match="the job array has gaps: use --array=0-2"):
        parse_portion("auto", known)


@given(st.lists(st.integers(0, 50), max_size=30), st.integers(1, 60))
def test_groups_are_consecutive_and_large_enough(sizes: Sequence[int], least: int) -> None:
    groups = grouped(sizes, least)
    assert [place for group in groups for place in group] == list(range(len(sizes)))
    assert all(sum(sizes[place] for place in group) >= least for group in groups[:-1])


def test_of_two_calls_that_start_at_once_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other_first(source: Path, target: Path) -> None:
        target.write_text('{"model": "other"}\n')
        raise FileExistsError

    monkeypatch.setattr(os, "link", other_first)
    with pytest.raises(UserError, match=r"was left by a call with another model"):
        Partial.open(tmp_path / "out", CALL, SIZES)
    assert [path.name for path in (tmp_path / "out.partial").iterdir()] == ["call.json"]


def test_a_file_system_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(source: Path, target: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", none)
    for _ in range(2):
        assert Partial.open(tmp_path / "out", CALL, SIZES).todo() == list(SIZES)
