"""`megabase sync` and the last word, against a real server."""

import json
import shutil
import threading
from pathlib import Path

import pytest

from megabase.datamodules.files import FileLock
from megabase.pipeline import cli
from megabase.pipeline.config.load import save
from megabase.pipeline.config.schema import RunConfig
from megabase.pipeline.rundir.paths import RunPaths
from megabase.pipeline.rundir.status import write_status
from megabase.pipeline.tracking import sync as sync_module
from megabase.pipeline.tracking.identity import Identity
from megabase.pipeline.tracking.last_word import say_last_word
from megabase.pipeline.tracking.mirror import Mirror
from tests.pipeline.tracking.runs import expected, history, runs_of, write
from tests.pipeline.tracking.servers import PASS, REFUSE, Proxy, Server
from tests.pipeline.tracking.test_mirror import only

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("mlflow")]


@pytest.fixture
def offline(run: RunConfig, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, list[str]]:
    """A run that does not send its journal, and the settings with which it is sent from elsewhere."""
    settings = [f"tracking.uri={run.tracking.uri}", f"tracking.experiment={run.tracking.experiment}"]
    run.tracking.uri, run.tracking.enabled = None, False
    save(run, RunPaths(run.directory).config)
    Identity(run.directory, "r").update(status=None, last_word=None)  # as a start does
    monkeypatch.setattr(sync_module, "POLL_S", 0.1)
    return run.directory, settings


def test_a_run_is_sent_in_pieces_beside_its_job(
    offline: tuple[Path, list[str]], run: RunConfig, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    directory, settings = offline
    write(run, 1, 30)
    write_status(directory, "running", 0)
    copy = directory.parent / "copy"
    shutil.copytree(directory, copy)
    assert cli.main(["sync", str(copy), *settings]) == 0
    assert capsys.readouterr().out.startswith("62 new points; http://127.0.0.1:")
    assert only(server, run).info.status == "RUNNING"

    write(run, 21, 50, again=1000.0)
    follower = threading.Thread(target=cli.main, args=(["sync", "--follow", str(directory), *settings],))
    follower.start()
    write(run, 51, 60)
    write_status(directory, "finished", 60)
    follower.join(timeout=60)
    assert not follower.is_alive()
    found = only(server, run)
    assert found.info.status == "FINISHED" and found.data.tags["megabase.restarts"] == "2"
    points = history(server.uri, found.info.run_id)
    assert points[:30] == expected(1, 30) and [point[0] for point in points] == list(range(1, 61))
    capsys.readouterr()
    assert cli.main(["sync", str(directory), *settings]) == 0
    out = capsys.readouterr().out
    assert (
        out.startswith("0 new points; ") and f"/runs/{found.info.run_id}?workflowType=machine_learning" in out
    )
    assert history(server.uri, found.info.run_id) == points


def test_what_sync_refuses(
    offline: tuple[Path, list[str]],
    proxy: Proxy,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    directory, settings = offline
    for arguments, code, message in (
        ([str(directory / "no")], 2, "no such directory"),
        ([str(directory), "optim.lr=1"], 2, "optim.lr=1: give settings as tracking.KEY=VALUE"),
        ([str(directory), "tracking.uri=http://me:pw@host"], 2, "tracking.uri holds a user name or password"),
    ):
        assert cli.main(["sync", *arguments]) == code
        assert message in capfd.readouterr().err
    proxy.behave = lambda path: REFUSE
    assert cli.main(["sync", str(directory), *settings]) == 1
    error = capfd.readouterr().err
    assert "does not take the run (MlflowException): nothing is lost" in error and error.count("\n") == 1
    monkeypatch.setattr(sync_module, "LOCK_WAIT_S", 0.0)
    with FileLock.take(RunPaths(directory).tracking_lock):
        assert cli.main(["sync", str(directory), *settings]) == 1
    assert "is being sent by" in capfd.readouterr().err


def test_the_last_word_about_a_run_that_was_killed(run: RunConfig, proxy: Proxy, server: Server) -> None:
    write(run, 1, 5)
    write_status(run.directory, "running", 0)
    Identity(run.directory, "r").update(status=None, last_word=None)
    assert Mirror(run, run.directory).start().finish("RUNNING", timeout_s=60)
    assert only(server, run).info.status == "RUNNING"
    write(run, 6, 9)  # which the mirror of the killed process has not sent
    proxy.behave = lambda path: REFUSE
    assert not say_last_word(run.directory, "FAILED", timeout_s=2.0)
    assert json.loads(RunPaths(run.directory).mlflow.read_text())["last_word"] == "FAILED"
    proxy.behave = lambda path: PASS
    assert say_last_word(run.directory, "FAILED")
    found = only(server, run)
    assert found.info.status == "FAILED"
    assert history(server.uri, found.info.run_id) == expected(1, 9)
    proxy.paths.clear()
    assert (
        say_last_word(run.directory, "KILLED") and not proxy.paths
    )  # it has ended: another word changes nothing
    assert say_last_word(run.directory.parent / "no such run", "FAILED")


def test_a_job_says_the_last_word_only_if_it_does_not_start_again(
    run: RunConfig, server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(run, 1, 5)
    Identity(run.directory, "r").update(status=None, last_word=None)
    assert Mirror(run, run.directory).start().finish("RUNNING", timeout_s=60)
    status, record = tmp_path / "status.json", tmp_path / "record.json"
    checkpoints = RunPaths(run.directory).checkpoints
    status.write_text(json.dumps({"state": "running", "step": 0, "checkpoints": str(checkpoints)}))
    arguments = [
        "job-end",
        "--code",
        "137",
        "--status",
        str(status),
        "--record",
        str(record),
        "--max-stalls",
        "1",
        *("--log", str(tmp_path / "job.out"), "--job", "7", "--seconds", "1"),
    ]
    assert cli.main(arguments) == 0 and capsys.readouterr().out.startswith("again ")
    assert only(server, run).info.status == "RUNNING"
    assert cli.main(arguments) == 0 and capsys.readouterr().out == "end 137 -\n"
    assert only(server, run).info.status == "FAILED"


def test_two_senders_without_locks_store_each_point_once(
    run: RunConfig, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(run, 1, 30)
    assert Mirror(run, run.directory).start().finish("RUNNING", timeout_s=60)
    monkeypatch.setattr("megabase.datamodules.files._flock", lambda descriptor: False)
    write(run, 31, 200)
    mirrors = [Mirror(run, run.directory).start() for _ in range(2)]
    for mirror in mirrors:
        assert mirror.finish("FINISHED", timeout_s=60)
    (found,) = runs_of(server.uri, run.tracking.experiment)
    assert history(server.uri, found.info.run_id) == expected(1, 200)
