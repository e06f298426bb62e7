"""Signals set a flag and nothing else; hashes of samples ignore order and rank."""

import os
import signal
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.agreement import hash_samples
from pipeline.preemption import StopRequest

# Another process sends as fast as it can, so that handlers interrupt handlers.
PROGRAM = """
import os, signal, sys
from pipeline.preemption import StopRequest
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


def test_a_second_ctrl_c_interrupts() -> None:
    stop = StopRequest()
    stop._handle(signal.SIGINT, None)
    assert stop
    with pytest.raises(KeyboardInterrupt):
        stop._handle(signal.SIGINT, None)


@given(st.lists(st.integers(-1, 2**40), max_size=30), st.integers(1, 5), st.randoms())
def test_hash_of_parts_adds_up_to_the_hash_of_all(ids: list[int], parts: int, chance) -> None:
    shuffled = ids[:]
    chance.shuffle(shuffled)
    total = sum(hash_samples(shuffled[part::parts]) for part in range(parts))
    assert total % 2**64 == hash_samples(ids) % 2**64
    assert -(2**63) <= hash_samples(ids) < 2**63


def test_swapping_bases_of_equal_sum_changes_the_hash() -> None:
    assert hash_samples([1, 4]) != hash_samples([2, 3])
