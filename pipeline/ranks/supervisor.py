"""Starting the ranks of one machine as processes, and ending them together."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import megabase
from megabase.datamodules.processes import end_with_parent, signals_blocked
from megabase.pipeline.ranks.stop import CTRL_C, INTERRUPTED, REASONS, STOP_SIGNALS, StopRequest

logger = logging.getLogger(__name__)

# Seconds that the other ranks have to exit after one has failed; then they are killed.
GRACE_S = 10.0
# Seconds to wait for a killed process: while it waits for a disk that does not respond, it does not end.
KILLED_WAIT_S = 30.0
# The signal that tells rank 0 what set the flag.
_PASSED_ON = {REASONS[number]: number for number in (signal.SIGTERM, signal.SIGUSR1, CTRL_C)}
# Set in the environment of the ranks that `supervise` starts.
_SUPERVISED = "MEGABASE_SUPERVISED"


def is_supervised() -> bool:
    """Whether `supervise` started this process as a rank."""
    return _SUPERVISED in os.environ


def megabase_command(*arguments: str) -> list[str]:
    """The command line that runs `megabase ARGUMENTS...` with this interpreter and the same packages.

    `-P` keeps the user's working directory off the module path, as the `megabase` script does. If this process itself
    found megabase in the working directory (`python -m` in a source tree), the new process must find it there, too.
    """
    root = Path(megabase.__file__).resolve().parents[1]
    in_source_tree = (
        not sys.flags.safe_path and Path(sys.path[0] or ".").resolve() == root == Path.cwd().resolve()
    )
    return [sys.executable, *([] if in_source_tree else ["-P"]), "-m", "megabase.pipeline.cli", *arguments]


def supervise(command: Sequence[str], ranks: int, stop: StopRequest, *, hint: Callable[[], str]) -> int:
    """Start `ranks` processes of `command` on this machine and wait for them.

    If a rank fails, the others are killed GRACE_S seconds later. A signal that sets `stop` is passed on to rank 0; the
    ranks then agree on the step to stop at. A KeyboardInterrupt interrupts the ranks, which have GRACE_S seconds to
    write their status. If this process dies, the kernel kills the ranks.

    Args:
        command: the command line of one rank, which reads torchrun's variables from its environment.
        ranks: number of processes.
        stop: set by the signals of this process.
        hint: returns the end of a message about a rank that was interrupted or killed.

    Returns:
        The exit code of rank 0, or of the first rank that failed; 1 if a signal ended that rank.

    Raises:
        KeyboardInterrupt: this process was interrupted; all ranks have ended.
    """
    processes = _start(command, ranks)
    signal_sent = False
    try:
        while processes[0].poll() is None and all(p.poll() in (None, 0) for p in processes[1:]):
            if stop and not signal_sent:
                processes[0].send_signal(_PASSED_ON.get(stop.reason, signal.SIGUSR1))
                signal_sent = True
            time.sleep(0.1)
    except KeyboardInterrupt:
        _interrupt(processes)
        raise
    except BaseException:
        for process in processes:
            process.kill()
        raise
    return _end(processes, hint)


def free_port() -> int:
    """A TCP port of this machine that nothing listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _start(command: Sequence[str], ranks: int) -> list[subprocess.Popen[bytes]]:
    environment = os.environ | {
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "GROUP_RANK": "0",
        _SUPERVISED: "1",
    }
    threads = max(1, len(os.sched_getaffinity(0)) // ranks)
    environment.setdefault("OMP_NUM_THREADS", str(threads))
    # A rank unblocks the stop signals when it has its handlers (`StopRequest.listen`).
    with signals_blocked(STOP_SIGNALS):
        return [
            subprocess.Popen(
                command,
                env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                preexec_fn=partial(end_with_parent, os.getpid()),
            )
            for rank in range(ranks)
        ]


def _interrupt(processes: list[subprocess.Popen[bytes]]) -> None:
    """Interrupt the ranks; kill those that have not ended GRACE_S seconds later, or at another KeyboardInterrupt."""
    try:
        for process in processes:
            process.send_signal(signal.SIGINT)
        deadline = time.monotonic() + GRACE_S
        while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
            time.sleep(0.05)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            with suppress(subprocess.TimeoutExpired):
                process.wait(KILLED_WAIT_S)


def _end(processes: list[subprocess.Popen[bytes]], hint: Callable[[], str]) -> int:
    """Give the ranks GRACE_S seconds to exit, and kill the rest; returns the first failed rank's exit code, or 0."""
    failed = [rank for rank, process in enumerate(processes) if process.poll() not in (None, 0)]
    deadline = time.monotonic() + GRACE_S
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        time.sleep(0.05)
    for process in processes:
        if process.poll() is None:
            process.kill()
        with suppress(subprocess.TimeoutExpired):
            process.wait(KILLED_WAIT_S)
    for rank in failed:
        code = processes[rank].returncode
        if code == INTERRUPTED:
            logger.error(f"rank {rank} was interrupted; {hint()}")
        if code < 0:
            name = signal.Signals(-code).name
            logger.error(f"rank {rank} was ended by {name}; {hint()}")
    code = processes[failed[0] if failed else 0].returncode
    return 1 if code < 0 else code
