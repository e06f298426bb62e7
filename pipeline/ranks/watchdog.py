"""Detects a rank that hangs: it writes the stacks of all threads and ends the process.

The main thread calls `beat` (two stores, no system call) after every micro batch, batch of an evaluation and phase of a
checkpoint. A thread of each rank checks about once a second. After `hang_minutes` without a beat it writes the Python
stacks of all threads to `logs/rank-R.stacks.txt` and ends the process with code 1; the launcher then ends the other
ranks. If C code holds the GIL, this thread cannot run: then a thread of `faulthandler`, which does not need the GIL,
does the same. Every HEARTBEAT_S seconds the thread also writes `logs/rank-R.heartbeat`, which shows without a
debugger how far each rank is.

Each rank watches only itself. Ranks that wait in a collective for a rank that hangs do not beat either, so all of them
write their stacks: those of the rank that hangs show where, those of the others show the collective.
"""

from __future__ import annotations

import faulthandler
import json
import os
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megabase.pipeline.ranks.environment import node_name
from megabase.pipeline.rundir.paths import RunPaths

# Until the first micro batch is done, the limit is at least this many minutes: imports and compilation are slow.
START_MINUTES = 30.0
HEARTBEAT_S = 10.0
# Seconds between writing the stacks and the end of the process: the other ranks write theirs meanwhile.
LINGER_S = 3.0
# If writing the stacks hangs as well, faulthandler ends the process after this many seconds.
LAST_RESORT_S = 30.0
# Size of a heartbeat: each overwrites the one before in a single write.
_HEARTBEAT_BYTES = 512


@dataclass
class _Activity:
    """What the main thread last reported.

    Attributes:
        beats: how many times it has reported.
        doing: what it is doing since then, in a few words.
        step: optimizer steps done.
        training: whether the first micro batch is done.
    """

    beats: int = 0
    doing: str = "starting"
    step: int = 0
    training: bool = False


# Module-level, so that callers of `beat` need no Watchdog: a process has one main thread.
_activity = _Activity()


def beat(doing: str, step: int | None = None) -> None:
    """Report that the main thread works.

    Args:
        doing: what it does now, in a few words; the heartbeat file shows it until the next beat.
        step: optimizer steps done; None while training has not begun.
    """
    _activity.doing = doing
    if step is not None:
        _activity.step = step
        _activity.training = True
    _activity.beats += 1


class Watchdog:
    """Watches one rank from `start` to `stop`, or to the end of the process.

    Args:
        directory: the run directory; heartbeat and stack files go to its `logs/`, which is made if missing.
        rank: number of the rank.
        hang_minutes: time without a beat that counts as a hang; 0: only write heartbeats.
    """

    def __init__(self, directory: Path, rank: int, hang_minutes: float) -> None:
        paths = RunPaths(directory)
        self._rank = rank
        self._minutes = hang_minutes
        self._place = f"rank {rank} on {node_name()}, process {os.getpid()}"
        self._stacks_file = paths.stacks(rank)
        self._heartbeat_file = paths.heartbeat(rank)
        # A run must not fail because its logs cannot be written: stacks then go to stderr (descriptor 2).
        self._stacks, self._heartbeat = 2, -1
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        try:
            paths.logs.mkdir(parents=True, exist_ok=True)
            self._heartbeat = os.open(self._heartbeat_file, os.O_WRONLY | os.O_CREAT, 0o644)
            if hang_minutes:
                self._stacks = os.open(self._stacks_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            self._print(
                f"cannot write in {paths.logs} ({error.strerror}); if this rank hangs, its stacks go to stderr"
            )

    def start(self) -> Watchdog:
        """Begin to watch; returns itself."""
        self._thread.start()
        return self

    def stop(self) -> None:
        """Stop watching, before the rank exits. Removes the stack file if no rank wrote stacks to it."""
        self._stopped.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        self._write_heartbeat(0.0)
        if self._stacks != 2 and not os.fstat(self._stacks).st_size:
            self._stacks_file.unlink(missing_ok=True)

    def _watch(self) -> None:
        # Seconds between two checks: a tenth of the limit, at most 1. Without a limit: 1.
        interval = min(1.0, self._minutes * 6) or 1.0
        seen, since, wrote = -1, 0.0, -HEARTBEAT_S
        while True:
            now = time.monotonic()
            if _activity.beats != seen:
                seen, since = _activity.beats, now
            if self._minutes:
                limit = 60 * (self._minutes if _activity.training else max(self._minutes, START_MINUTES))
                if now - since > limit:
                    self._end(now - since)
                # If no thread can be started at this moment, the next check tries again.
                with suppress(RuntimeError):
                    faulthandler.dump_traceback_later(limit, exit=True, file=self._stacks)
            if now - wrote >= HEARTBEAT_S:
                self._write_heartbeat(now - since)
                wrote = now
            if self._stopped.wait(interval):
                return

    def _end(self, silent: float) -> None:
        """Write the stacks, print a message, and end the process."""
        faulthandler.dump_traceback_later(LAST_RESORT_S, exit=True, file=self._stacks)
        what = f"{self._place}, has not moved for {silent / 60:.1f} minutes ({_activity.doing}, step {_activity.step})"
        where = "on stderr" if self._stacks == 2 else f"in {self._stacks_file}"
        try:
            os.write(self._stacks, f"{time.strftime('%Y-%m-%d %H:%M:%S %z')}: {what}\n".encode())
            faulthandler.dump_traceback(self._stacks, all_threads=True)
        except OSError as error:
            where = f"on stderr ({self._stacks_file} cannot be written: {error.strerror})"
            faulthandler.dump_traceback(2, all_threads=True)
        self._write_heartbeat(silent)
        self._print(
            f"{what}: ending this rank; the stacks of all threads are {where}. If it was working and did not hang,"
            f" raise trainer.hang_minutes={self._minutes:g}"
        )
        time.sleep(LINGER_S)
        os._exit(1)

    def _write_heartbeat(self, silent: float) -> None:
        """Overwrite the heartbeat file in one write, because a reader may have it open."""
        if self._heartbeat < 0:
            return
        now = time.time()
        heartbeat: dict[str, Any] = {
            "rank": self._rank,
            "host": node_name(),
            "pid": os.getpid(),
            "step": _activity.step,
            "doing": _activity.doing,
            "beat": round(now - silent, 1),
            "written": round(now, 1),
        }
        try:
            os.pwrite(self._heartbeat, f"{json.dumps(heartbeat):<{_HEARTBEAT_BYTES - 1}}\n".encode(), 0)
        except OSError as error:
            self._print(f"{self._heartbeat_file} cannot be written any more: {error.strerror}")
            self._heartbeat = -1

    def _print(self, text: str) -> None:
        # Not through sys.stderr: the thread that hangs may hold the lock of that stream.
        with suppress(OSError):
            os.write(2, f"megabase: {text}\n".encode())
