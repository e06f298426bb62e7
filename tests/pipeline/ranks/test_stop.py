"""Requests to stop: signals set a flag and nothing else; a STOP file and a time limit set it, too."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megabase.pipeline.ranks import stop as stop_module
from megabase.pipeline.ranks.stop import ANSWER, CTRL_C, StopRequest

# Another process sends as fast as it can, so that handlers interrupt handlers.
PROGRAM = """
import os, signal, sys
from megabase.pipeline.ranks.stop import StopRequest
stop = StopRequest().listen()
assert not stop
os.kill(os.getpid(), signal.SIGUSR1)
me = os.getpid()
sender = os.fork()
if sender == 0:
    for _ in range(3000):
        os.kill(me, signal.SIGTERM)
        os.kill(me, signal.SIGUSR1)
    os.kill(me, signal.SIGINT)
    os._exit(0)
os.waitpid(sender, 0)
print(bool(stop), stop.reason)
"""


def test_signals_set_a_flag_and_a_second_one_changes_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.stdout.split() == ["True", signal.SIGUSR1.name], done.stderr


@pytest.mark.parametrize("before", [[], [signal.SIGTERM, signal.SIGUSR1]])
def test_a_second_ctrl_c_interrupts_whatever_came_before(before: list[signal.Signals]) -> None:
    stop = StopRequest()
    for signum in [*before, signal.SIGINT]:
        stop._handle(signum, None)
    assert stop.reason == (before[0].name if before else "Ctrl-C (SIGINT)")
    with pytest.raises(KeyboardInterrupt):
        stop._handle(signal.SIGINT, None)
    stop._handle(signal.SIGINT, None)  # a rank is interrupted once: meanwhile it writes its status


@pytest.mark.parametrize("first", [[signal.SIGINT, CTRL_C], [signal.SIGINT], [CTRL_C]])
def test_the_terminals_signal_and_the_supervisors_are_one_ctrl_c(first: list[signal.Signals]) -> None:
    stop = StopRequest()
    for signum in first:
        stop._handle(signum, None)
    assert stop.reason == "Ctrl-C (SIGINT)"
    with pytest.raises(KeyboardInterrupt):
        stop._handle(signal.SIGINT, None)


def test_the_process_that_the_user_started_answers_the_first_ctrl_c(
    capfd: pytest.CaptureFixture[str],
) -> None:
    stop = StopRequest(answers=True)
    stop._handle(signal.SIGINT, None)
    assert capfd.readouterr().err == f"megabase: {ANSWER}\n"
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            stop._handle(signal.SIGINT, None)
    StopRequest()._handle(signal.SIGINT, None)
    assert capfd.readouterr().err == ""


def wait_for(stop: StopRequest) -> str:
    deadline = time.monotonic() + 10
    while not stop and time.monotonic() < deadline:
        time.sleep(0.01)
    return stop.reason


def test_a_stop_file_sets_the_flag_and_by_person(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stop_module, "POLL_S", 0.01)
    stop = StopRequest()
    stop.watch(tmp_path / "STOP")
    time.sleep(0.1)
    assert not stop and not stop.by_person
    (tmp_path / "STOP").touch()
    assert wait_for(stop) == str(tmp_path / "STOP")
    assert stop.by_person


def test_a_stop_file_after_a_signal_counts_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stop_module, "POLL_S", 0.01)
    stop = StopRequest()
    stop._handle(signal.SIGUSR1, None)
    (tmp_path / "STOP").touch()
    stop.watch(tmp_path / "STOP")
    deadline = time.monotonic() + 10
    while not stop.by_person and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (stop.reason, stop.by_person) == ("SIGUSR1", True)


def test_a_time_limit_sets_the_flag_but_not_by_person(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stop_module, "POLL_S", 0.01)
    stop = StopRequest()
    began = time.monotonic()
    stop.watch(tmp_path / "STOP")
    stop.minutes = 0.005
    assert wait_for(stop) == "trainer.max_minutes=0.005"
    assert time.monotonic() - began >= 0.29
    # Threads of these tests end with the file.
    assert not stop.by_person
    (tmp_path / "STOP").touch()
