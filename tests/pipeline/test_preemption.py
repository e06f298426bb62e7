"""Signals set a flag and nothing else; hashes of samples ignore order and rank."""

import os
import signal
import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st

from pipeline.agreement import hash_samples

PROGRAM = """
import os, signal, sys
from pipeline.preemption import StopRequest
stop = StopRequest().listen()
assert not stop
for signum in (signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
    os.kill(os.getpid(), signum)
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


@given(st.lists(st.integers(-1, 2**40), max_size=30), st.integers(1, 5), st.randoms())
def test_hash_of_parts_adds_up_to_the_hash_of_all(ids: list[int], parts: int, chance) -> None:
    shuffled = ids[:]
    chance.shuffle(shuffled)
    total = sum(hash_samples(shuffled[part::parts]) for part in range(parts))
    assert total % 2**64 == hash_samples(ids) % 2**64
    assert -(2**63) <= hash_samples(ids) < 2**63


def test_swapping_bases_of_equal_sum_changes_the_hash() -> None:
    assert hash_samples([1, 4]) != hash_samples([2, 3])
