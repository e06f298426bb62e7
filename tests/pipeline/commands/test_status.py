"""`megabase status`: which runs it shows, in which form, and that it ends."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megabase.pipeline import cli
from megabase.pipeline.commands import status
from megabase.pipeline.rundir.paths import RunPaths
from megabase.pipeline.rundir.status import write_status


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run.root with two runs and something else, in the working directory of a machine without SLURM."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    for name, state in (("phage", "finished"), ("hg38", "crashed")):
        paths = RunPaths(tmp_path / "runs" / name)
        paths.directory.mkdir(parents=True)
        paths.config.write_text("trainer:\n  max_steps: 4\n")
        write_status(paths.directory, state, 4)
    (tmp_path / "runs" / "notes").mkdir()
    return tmp_path / "runs"


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ([], ["hg38", "phage"]),
        (["runs"], ["hg38", "phage"]),
        (["runs/phage", "runs/hg38"], ["phage", "hg38"]),
        (["runs/phage", "runs"], ["phage", "hg38"]),
    ],
)
def test_which_runs(words: list[str], names: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["status", *words]) == 0
    printed = capsys.readouterr()
    assert [line.split()[0] for line in printed.out.splitlines()] == ["run", *names]
    assert printed.err == ""
    assert cli.main(["status", "--json", *words]) == 0
    assert [each["run"] for each in json.loads(capsys.readouterr().out)] == names


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["runs/notes"], "runs/notes: not a run directory: no run has started here"),
        (["runs", "nowhere"], "nowhere: no such directory"),
        (["runs/hg38/config.yaml"], "runs/hg38/config.yaml: a file"),
    ],
)
def test_wrong_directories_are_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for more in ([], ["--watch"]):
        assert cli.main(["status", *words, *more]) == 2
        printed = capsys.readouterr()
        assert message in printed.err and printed.err.count("\n") == 1 and not printed.out


def test_without_a_root_it_says_what_to_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path / "runs")
    assert cli.main(["status"]) == 2
    assert "no directory runs/ here: name run directories" in capsys.readouterr().err


def test_a_controller_without_an_answer_is_named_and_the_rest_is_shown(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    RunPaths(root / "hg38").job.write_text('{"jobs": [7]}')
    squeue = root.parent / "squeue"
    squeue.write_text(
        "#!/bin/sh\necho slurm_load_jobs error: Unable to contact slurm controller >&2\nexit 1\n"
    )
    squeue.chmod(0o755)
    assert cli.main(["status"]) == 0
    printed = capsys.readouterr()
    assert "hg38   crashed" in printed.out
    assert "without SLURM's jobs: squeue: slurm_load_jobs error: Unable to contact slurm" in printed.err


@pytest.mark.parametrize("terminal", [False, True])
def test_watch_shows_it_again_until_ctrl_c(
    terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    looks = iter(range(2))

    def interrupt(seconds: float) -> None:
        if next(looks, None) is None:
            raise KeyboardInterrupt

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    monkeypatch.setattr(status.time, "sleep", interrupt)
    assert cli.main(["status", "--watch"]) == 0
    printed = capsys.readouterr()
    assert printed.out.count("hg38") >= (1 if terminal else 3)
    assert ("Ctrl-C ends" in printed.out) == terminal
    assert printed.err == ""


@pytest.mark.slow
def test_it_needs_no_torch() -> None:
    program = (
        "import sys; from megabase.pipeline import cli; code = cli.main(sys.argv[1:])\n"
        "assert not {'torch', 'numpy', 'omegaconf'} & set(sys.modules), sys.modules; sys.exit(code)"
    )
    command = [sys.executable, "-c", program, "status"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
