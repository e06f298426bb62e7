"""Child processes: none outlives its parent, and none misses a signal that comes while it starts.

A child inherits the mask of blocked signals from the thread that starts it. So a parent blocks signals around the start
(`signals_blocked`); the child unblocks them once its handlers are set, and then receives what came meanwhile.
"""

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager

_PR_SET_PDEATHSIG = 1
# Loaded before any fork: between fork and exec, a child of a process with threads must not load libraries.
_LIBC = ctypes.CDLL(None)


@contextmanager
def signals_blocked(signals: Collection[int]) -> Iterator[None]:
    """Block signals in this thread, and in the processes that it starts meanwhile.

    On leaving, the thread's own mask is as before, and a signal that came meanwhile is delivered; another thread of
    this process may have received it earlier. The started processes keep their signals blocked until they call
    `signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)`.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_parent(parent: int | None = None) -> None:
    """In a child: have the kernel kill this process (SIGKILL) when its parent ends, also after an exec.

    The parent is the thread that started the child: it must live as long as the child shall. Linux only; elsewhere this
    only checks once that the parent still runs. May be called between fork and exec (`preexec_fn`).

    Args:
        parent: process id of the parent; None in a process of `multiprocessing` that was forked or spawned. A process
            of a fork server is not a child of the process that asked for it, and ends at once.
    """
    if parent is None:
        process = multiprocessing.parent_process()
        assert process is not None and process.pid is not None, "not a child of multiprocessing"
        parent = process.pid
    if sys.platform == "linux":
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the call above
        os._exit(1)
