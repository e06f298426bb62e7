import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

from megabase.datamodules.processes import end_with_parent, signals_blocked

_PARENT = """
import os, signal, subprocess, sys
from functools import partial
from megabase.datamodules.processes import end_with_parent
child = subprocess.Popen(["sleep", "60"], preexec_fn=partial(end_with_parent, os.getpid()))
print(child.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_child_is_killed_when_its_parent_is_killed() -> None:
    parent = subprocess.run([sys.executable, "-c", _PARENT], capture_output=True, text=True, check=False)
    assert parent.returncode == -signal.SIGKILL
    assert _ended(int(parent.stdout))


def test_child_whose_parent_is_gone_ends_at_once() -> None:
    child = subprocess.run(["sleep", "60"], preexec_fn=partial(end_with_parent, os.getpid() + 1), check=False)
    assert child.returncode == 1


def test_blocked_signal_is_delivered_afterwards_and_children_inherit_the_block() -> None:
    received: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: received.append(number))
    show = "import signal; print(signal.SIGUSR1 in signal.pthread_sigmask(signal.SIG_BLOCK, []))"
    try:
        with signals_blocked([signal.SIGUSR1]):
            signal.raise_signal(signal.SIGUSR1)  # to this thread: pytest-xdist has others
            child = subprocess.run([sys.executable, "-c", show], capture_output=True, text=True, check=True)
            assert not received
        assert received == [signal.SIGUSR1]
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert child.stdout.strip() == "True"
    assert signal.SIGUSR1 not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def _ended(process: int) -> bool:
    """Whether a process is gone, or a zombie, within 10 seconds."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2][:1]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False
