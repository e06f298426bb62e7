"""A run as `megabase watch` reads it: not started, training, rewritten by a start, ended, damaged."""

import json
import os
from pathlib import Path

import pytest

from megabase.pipeline.errors import UserError
from megabase.pipeline.rundir.journal import Journal
from megabase.pipeline.rundir.paths import RunPaths
from megabase.pipeline.rundir.status import write_status
from megabase.pipeline.rundir.view import MEANINGS, SILENT_S, RunView, Size, find_runs, read_size
from tests.pipeline.rundir.test_figures import loss, speed


@pytest.fixture
def run(tmp_path: Path) -> RunPaths:
    """A run directory as `megabase submit` leaves it."""
    (tmp_path / "phage").mkdir()
    paths = RunPaths(tmp_path / "phage")
    paths.submit_script.touch()
    return paths


def start(run: RunPaths, step: int, max_steps: int = 100) -> tuple[Journal, Journal]:
    """What a start writes before it trains."""
    run.config.write_text(f"trainer:\n  max_steps: {max_steps}\n")
    write_status(run.directory, "running", step)
    return Journal(run.metrics, step), Journal(run.performance, 10**9)


def heartbeat(run: RunPaths, written: float) -> None:
    run.logs.mkdir(exist_ok=True)
    run.heartbeat(0).write_text(json.dumps({"written": written, "doing": "evaluating", "host": "n1"}))


def test_a_run_is_followed_from_before_its_start_through_a_resume_to_its_end(run: RunPaths) -> None:
    view = RunView(run.directory)
    view.read()
    assert (view.state(0.0).text, view.figures.step) == ("has not started yet", 0)

    metrics, performance = start(run, 0)
    metrics.append([loss(1, 2.0), loss(2, 1.9)])
    performance.append([{"step": 0, "time": 1.0, "started": True}, speed(2, 3.0)])
    assert view.read() and not view.read()
    assert (view.figures.step, view.figures.max_steps, view.figures.bits) == (2, 100, 1.9)
    assert view.state(5.0).text == "running"
    metrics.append([loss(3, 1.8)])
    with run.metrics.open("a") as file:
        file.write('{"step": 4, "loss":')  # a row that is being written
    assert view.read() and view.figures.step == 3
    metrics.close()
    performance.close()

    # It was killed and resumes from step 2, with another last step.
    metrics, performance = start(run, 2, max_steps=200)
    assert view.read()
    assert (view.figures.step, view.figures.max_steps, view.figures.bits) == (2, 200, 1.9)
    metrics.append([loss(3, 1.8), loss(4, 1.7)])
    assert view.read() and view.figures.step == 4
    metrics.close()
    performance.close()

    write_status(run.directory, "finished", 4)
    assert view.state(9.0).finished


def test_a_journal_of_which_nothing_is_left_is_read_anew(run: RunPaths) -> None:
    metrics, performance = start(run, 0)
    metrics.append([loss(1, 2.0)])
    view = RunView(run.directory)
    view.read()
    run.metrics.unlink()
    assert view.read() and view.figures.step == 0
    metrics.close()
    performance.close()


def test_every_state_has_a_meaning(run: RunPaths) -> None:
    from megabase.pipeline.tracking.status import OF_STATE

    assert set(MEANINGS) == set(OF_STATE) - {"running"}
    view = RunView(run.directory)
    for word in MEANINGS:
        write_status(run.directory, word, 3)
        assert view.state(0.0).text == MEANINGS[word]
        assert view.state(0.0).finished == (word == "finished")


def test_a_killed_run_is_recognized_by_its_heartbeat(run: RunPaths) -> None:
    write_status(run.directory, "running", 0)
    heartbeat(run, 1000.0)
    view = RunView(run.directory)
    assert view.state(1005.0).text == "evaluating, on n1"
    silent = view.state(1000.0 + 2 * SILENT_S).text
    assert silent.startswith("no sign of life for 3 min: probably killed; run it again to begin from step 0")


@pytest.mark.parametrize(
    "line",
    [
        "half a row\n",
        "[1]\n",
        '{"loss": 1.0}\n',
        '{"loss": 1.0, "step": 1, "bits_per_base": "x"}\n',
        "\xff\n",
    ],
)
def test_a_damaged_journal_is_named(run: RunPaths, line: str) -> None:
    run.metrics.write_bytes(line.encode("latin1"))
    with pytest.raises(UserError, match=r"metrics\.jsonl is damaged: a line is not a row"):
        RunView(run.directory).read()


def test_files_that_are_half_written_or_strange_do_not_matter(run: RunPaths) -> None:
    run.config.write_text("trainer: [")
    run.status.write_text('{"state": "runn')
    view = RunView(run.directory)
    view.read()
    assert view.figures.max_steps is None and view.state(0.0).text == "has not started yet"
    for text in ("trainer:\n  max_steps: many\n", "- 1\n", ""):
        run.config.write_text(text)
        view.read()
        assert view.figures.max_steps is None
    run.status.write_text("[]")
    assert view.state(0.0).text == "has not started yet"


def test_another_directory_is_refused(run: RunPaths, tmp_path: Path) -> None:
    checkpoint = RunPaths(run.checkpoints / "step-5")
    checkpoint.directory.mkdir(parents=True)
    checkpoint.metrics.touch()
    empty, file = tmp_path / "empty", tmp_path / "file"
    empty.mkdir()
    file.touch()
    for directory, says in (
        (tmp_path / "none", "no such directory: give a run directory"),
        (file, "a file: give a run directory"),
        (empty, "no run has started here"),
        (tmp_path, f"holds runs, but is not one: give one of {run.directory}"),
        (checkpoint.directory, f"inside one: give {run.directory}"),
    ):
        with pytest.raises(UserError, match=says):
            RunView(directory)


def test_a_directory_that_may_not_be_read(run: RunPaths) -> None:
    if os.geteuid() == 0:
        pytest.skip("root reads everything")
    run.metrics.touch(mode=0)
    with pytest.raises(UserError, match="cannot be read"):
        RunView(run.directory).read()


def test_a_user_names_runs_or_directories_of_runs(run: RunPaths) -> None:
    root = run.directory.parent
    (root / "corn").mkdir()
    RunPaths(root / "corn").config.touch()
    (root / "notes").mkdir()
    assert find_runs([root]) == [root / "corn", run.directory]
    assert find_runs([run.directory, root]) == [run.directory, root / "corn"]
    for wrong, words in ((root / "notes", "no run has started here"), (root / "none", "no such directory")):
        with pytest.raises(UserError, match=words):
            find_runs([root, wrong])


@pytest.mark.parametrize(
    ("config", "size"),
    [
        ("trainer: {max_steps: 9, nodes: 2, devices: 4}", Size(9, 8)),
        ("trainer: {max_steps: 9, nodes: 2, devices: null}", Size(9, None)),
        ("trainer: {max_steps: x, nodes: 1, devices: 2}", Size(None, 2)),
        ("trainer: [", Size()),
        ("[]", Size()),
        ("", Size()),
    ],
)
def test_the_size_of_a_run_is_in_its_config(run: RunPaths, config: str, size: Size) -> None:
    run.config.write_text(config)
    assert read_size(run) == size
