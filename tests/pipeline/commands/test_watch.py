"""`megabase watch`: what it prints, and that it ends."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from megabase.pipeline import cli
from megabase.pipeline.commands import watch
from megabase.pipeline.rundir.journal import Journal
from megabase.pipeline.rundir.paths import RunPaths
from megabase.pipeline.rundir.status import write_status
from tests.pipeline.rundir.test_figures import loss, speed


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that trains: 2 of 4 steps are done."""
    paths = RunPaths(tmp_path / "phage")
    paths.directory.mkdir()
    paths.config.write_text("trainer:\n  max_steps: 4\n")
    write_status(paths.directory, "running", 0)
    Journal(paths.metrics, 0).append([loss(1, 2.0), loss(2, 1.0)])
    now = time.time()
    Journal(paths.performance, 0).append([{"step": 0, "time": now, "started": True}, speed(2, now)])
    return paths.directory


def test_once_prints_the_state_and_needs_no_torch(run: Path) -> None:
    program = (
        "import sys; from megabase.pipeline import cli; code = cli.main(sys.argv[1:])\n"
        "assert not {'torch', 'numpy', 'omegaconf'} & set(sys.modules), sys.modules; sys.exit(code)"
    )
    command = [sys.executable, "-c", program, "watch", str(run), "--once"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    name, *lines = done.stdout.splitlines()
    assert name == "phage"
    assert [line.split(maxsplit=1)[0] for line in lines] == ["step", "loss", "speed", "state"]
    assert lines[0].endswith("2 of 4 (50.0%), 0:00:00 left") and lines[-1].endswith("running")


def test_in_a_pipe_it_prints_lines_until_the_run_is_finished(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "POLL_S", 0.01)

    def train() -> None:
        with RunPaths(run).metrics.open("a") as journal:
            journal.write('{"step": 3, "loss": 0.5, "bits_per_base": 0.5}\n')
            journal.flush()
            time.sleep(0.05)
            journal.write('{"step": 4, "loss": 0.25, "bits_per_base": 0.25}\n')
        write_status(run, "finished", 4)

    thread = threading.Thread(target=train)
    thread.start()
    assert cli.main(["watch", str(run)]) == 0
    thread.join()
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "finished" and lines[-2].startswith("step 4/4  0.2500 bits/base")
    assert len(lines) <= 4  # not a line for each step


def test_ctrl_c_is_the_usual_end(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(watch.time, "sleep", interrupt)
    assert cli.main(["watch", str(run)]) == 0
    assert capsys.readouterr().err == ""


def test_a_wrong_directory_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["watch", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "not a run directory: no run has started here" in error
