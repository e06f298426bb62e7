"""Signals set a flag and nothing else; hashes of samples ignore order and rank."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megabase.pipeline.ranks import stop as preemption
from megabase.pipeline.ranks.agreement import hash_samples
from megabase.pipeline.ranks.stop import StopRequest

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
    assert stop.reason == [*before, signal.SIGINT][0].name
    with pytest.raises(KeyboardInterrupt):
        stop._handle(signal.SIGINT, None)


def wait_for(stop: StopRequest) -> str:
    deadline = time.monotonic() + 10
    while not stop and time.monotonic() < deadline:
        time.sleep(0.01)
    return stop.reason


def test_a_file_asks_to_stop_and_says_that_a_person_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preemption, "POLL_S", 0.01)
    stop = StopRequest()
    stop.watch(tmp_path / "STOP")
    time.sleep(0.1)
    assert not stop and not stop.by_person
    (tmp_path / "STOP").touch()
    assert wait_for(stop) == str(tmp_path / "STOP")
    assert stop.by_person


def test_a_file_after_a_signal_is_still_a_persons_wish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preemption, "POLL_S", 0.01)
    stop = StopRequest()
    stop._handle(signal.SIGUSR1, None)
    (tmp_path / "STOP").touch()
    stop.watch(tmp_path / "STOP")
    deadline = time.monotonic() + 10
    while not stop.by_person and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (stop.reason, stop.by_person) == ("SIGUSR1", True)


def test_minutes_ask_to_stop_but_no_person_did(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preemption, "POLL_S", 0.01)
    stop = StopRequest()
    began = time.monotonic()
    stop.watch(tmp_path / "STOP")
    stop.minutes = 0.005
    assert wait_for(stop) == "trainer.max_minutes=0.005"
    assert time.monotonic() - began >= 0.29
    # Threads of these tests end with the file.
    assert not stop.by_person
    (tmp_path / "STOP").touch()


@given(st.lists(st.integers(-1, 2**40), max_size=30), st.integers(1, 5), st.randoms())
def test_hash_of_parts_adds_up_to_the_hash_of_all(ids: list[int], parts: int, chance) -> None:
    shuffled = ids[:]
    chance.shuffle(shuffled)
    total = sum(hash_samples(shuffled[part::parts]) for part in range(parts))
    assert total % 2**64 == hash_samples(ids) % 2**64
    assert -(2**63) <= hash_samples(ids) < 2**63


def test_swapping_bases_of_equal_sum_changes_the_hash() -> None:
    assert hash_samples([1, 4]) != hash_samples([2, 3])
