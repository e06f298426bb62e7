"""Messages go to stderr, each once and on one line; stdout is for results."""

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megabase.pipeline import cli, log
from megabase.pipeline.checkpoint.manifest import MANIFEST
from tests.conftest import DATA

logger = logging.getLogger("megabase.pipeline.somewhere")


def test_messages_carry_the_name_of_the_program(capsys: pytest.CaptureFixture[str]) -> None:
    log.set_up()
    logger.info("a %s", "file [with] brackets")
    logger.debug("not shown")
    log.PROGRESS.info("step 1/2")
    printed = capsys.readouterr()
    assert printed.err == "megabase: a file [with] brackets\nstep 1/2\n"
    assert printed.out == ""


def test_a_second_set_up_shows_no_message_twice(capsys: pytest.CaptureFixture[str]) -> None:
    log.set_up()
    log.set_up()
    root = logging.StreamHandler()  # as a library may leave one
    logging.getLogger().addHandler(root)
    try:
        logger.warning("once")
    finally:
        logging.getLogger().removeHandler(root)
    assert capsys.readouterr().err.count("once") == 1


def test_on_a_terminal_a_long_message_stays_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    log.set_up()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "40")
    path = "/a/" + "long/" * 40
    logger.warning(f"{path} cannot be [read]")
    assert f"megabase: {path} cannot be [read]" in capsys.readouterr().err.splitlines()


def test_a_program_that_imports_megabase_gets_messages_only_if_it_sets_up_logging() -> None:
    program = "import logging, megabase; logging.getLogger('megabase.models').warning('shown')"
    with_handler = f"import logging; logging.basicConfig(); {program}"
    for code, expected in ((program, False), (with_handler, True)):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        assert ("shown" in done.stderr) is expected and not done.stdout and done.returncode == 0


def test_messages_work_while_the_interpreter_shuts_down() -> None:
    program = (
        "import atexit, logging\n"
        "from megabase.pipeline import log\n"
        "atexit.register(lambda: logging.getLogger('megabase.late').error('at the end'))\n"
        "log.set_up()\n"
        "class Late:\n"
        "    def __del__(self): logging.getLogger('megabase.late').error('later still')\n"
        "late = Late()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stderr.splitlines() == ["megabase: at the end", "megabase: later still"]


@pytest.fixture
def run_with_broken_checkpoint(undisturbed: Path, tmp_path: Path) -> Path:
    """A finished run whose newest checkpoint is broken, so that commands print a message about it."""
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    newest = max((run / "checkpoints").glob("step-*"), key=lambda path: int(path.name.split("-")[1]))
    (newest / MANIFEST).write_text("{}")
    return run


@pytest.mark.slow
@pytest.mark.distributed
def test_stdout_of_commands_that_read_a_run_holds_results_only(
    run_with_broken_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_with_broken_checkpoint
    assert cli.main(["checkpoints", str(run), "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert listed["checkpoints"][0]["state"] == "broken"
    assert cli.main(["export", str(run), str(tmp_path / "out")]) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{tmp_path / 'out'}: the weights of {run / 'checkpoints' / listed['next']}\n"
    assert "is broken" in printed.err


def test_stdout_of_commands_that_read_sequences_holds_results_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = str(tmp_path / "shards")
    assert cli.main(["prepare", str(DATA / "lambda_phage.fna.gz"), shards]) == 0
    first, *splits = capsys.readouterr().out.splitlines()
    assert first == f"{shards}: 1 record in 1 shard" and len(splits) == 1
    assert cli.main(["prepare", "--check", shards]) == 0
    assert capsys.readouterr().out == f"{shards}: 48,502 bases match their checksums\n"
    (tmp_path / "shards" / "index.parquet").unlink()
    assert cli.main(["index", shards]) == 0
    assert capsys.readouterr().out.splitlines() == [first, *splits]
    assert cli.main(["data", shards, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("command", ["train", "submit", "checkpoints", "export", "data", "index", "prepare"])
def test_stdout_of_a_command_that_fails_is_empty(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = str(tmp_path / "missing")
    more = [str(tmp_path / "out")] if command in ("export", "prepare") else []
    assert cli.main([command, missing, *more]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("megabase: ")


@pytest.mark.slow
def test_stdout_of_bench_holds_the_table_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--lengths", "256", "--contestants", "ours-local,sdpa", "--heads", "1", "--repeat", "1"]
    assert cli.main(["bench", "attention", *arguments]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("One attention layer's core") and "megabase: 256: " in printed.err
    assert "megabase: 256: " not in printed.out
