"""A rank that hangs says where, and ends itself: then whoever started the ranks ends the others.

The main thread beats (`beat`: two stores, no system call) after every micro batch, batch of an evaluation and phase
of a checkpoint. A thread of each rank looks about once a second. After `hang_minutes` without a beat it writes the
Python stacks of all threads to `logs/rank-R.stacks.txt` and leaves the process with code 1. A thread of
`faulthandler`, which needs no Python lock, stands behind it: it does the same when this thread cannot run either,
because C code holds that lock. Every HEARTBEAT_S seconds the thread also writes `logs/rank-R.heartbeat`: who is
behind can be seen without a debugger.

The rule is simple on purpose: silence of one rank, whatever the others do. Ranks that wait in a collective for one
that hangs are silent as well, so each writes its stacks: one of them hangs, the others show the collective.
"""

from __future__ import annotations

import faulthandler
import json
import os
import platform
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Until the first micro batch is done, silence may last this long at least: imports, kernels, a compiler.
START_MINUTES = 30.0
HEARTBEAT_S = 10.0
# A rank that hangs stays so long after it wrote its stacks: the others should get to write theirs, too.
LINGER_S = 3.0
# Writing stacks to a dead disk may hang in turn; that ends here.
LAST_RESORT_S = 30.0
# Room for one heartbeat, so that each overwrites the one before in a single write.
_HEARTBEAT_BYTES = 512


@dataclass
class _Pulse:
    """What the main thread has said. step: of the optimizer. training: whether a first micro batch is done."""

    beats: int = 0
    doing: str = "starting"
    step: int = 0
    training: bool = False


# One for the process, as there is one main thread: what beats need not know who watches.
_pulse = _Pulse()


def beat(doing: str, step: int | None = None) -> None:
    """The main thread lives.

    Args:
        doing: in a few words; it stands in the heartbeat file until the next beat.
        step: optimizer steps done; None while training has not begun.
    """
    _pulse.doing = doing
    if step is not None:
        _pulse.step = step
        _pulse.training = True
    _pulse.beats += 1


class Watchdog:
    """Watches over one rank from `start` to `stop`, or to the end of the process.

    Args:
        logs: directory of the heartbeat and stack files; made if missing.
        hang_minutes: silence that is a hang; 0 only writes heartbeats.
    """

    def __init__(self, logs: Path, rank: int, hang_minutes: float) -> None:
        self._rank = rank
        self._minutes = hang_minutes
        self._place = f"rank {rank} on {platform.node()}, process {os.getpid()}"
        self._stacks_file = logs / f"rank-{rank}.stacks.txt"
        self._heartbeat_file = logs / f"rank-{rank}.heartbeat"
        # A run must not fail because its logs cannot be written: then stacks go to stderr.
        self._stacks, self._heartbeat = 2, -1
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        try:
            logs.mkdir(parents=True, exist_ok=True)
            self._heartbeat = os.open(self._heartbeat_file, os.O_WRONLY | os.O_CREAT, 0o644)
            if hang_minutes:
                self._stacks = os.open(self._stacks_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            self._say(
                f"cannot write in {logs} ({error.strerror}); if this rank hangs, stderr gets its stacks"
            )

    def start(self) -> Watchdog:
        """Begin to watch."""
        self._thread.start()
        return self

    def stop(self) -> None:
        """Stop watching: the rank is about to leave by itself. Only a hang leaves a stack file behind."""
        self._stopped.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        self._write_heartbeat(0.0)
        if self._stacks != 2 and not os.fstat(self._stacks).st_size:
            self._stacks_file.unlink(missing_ok=True)

    def _watch(self) -> None:
        tick = min(1.0, self._minutes * 6) or 1.0
        seen, since, wrote = -1, 0.0, -HEARTBEAT_S
        while True:
            now = time.monotonic()
            if _pulse.beats != seen:
                seen, since = _pulse.beats, now
            if self._minutes:
                limit = 60 * (self._minutes if _pulse.training else max(self._minutes, START_MINUTES))
                if now - since > limit:
                    self._end(now - since)
                with suppress(RuntimeError):  # no thread to be had at this moment; the next look tries again
                    faulthandler.dump_traceback_later(limit, exit=True, file=self._stacks)
            if now - wrote >= HEARTBEAT_S:
                self._write_heartbeat(now - since)
                wrote = now
            if self._stopped.wait(tick):
                return

    def _end(self, silent: float) -> None:
        """Write the stacks, say so, leave."""
        faulthandler.dump_traceback_later(LAST_RESORT_S, exit=True, file=self._stacks)
        what = (
            f"{self._place}, has not moved for {silent / 60:.1f} minutes ({_pulse.doing}, step {_pulse.step})"
        )
        where = "on stderr" if self._stacks == 2 else f"in {self._stacks_file}"
        try:
            os.write(self._stacks, f"{time.strftime('%Y-%m-%d %H:%M:%S %z')}: {what}\n".encode())
            faulthandler.dump_traceback(self._stacks, all_threads=True)
        except OSError as error:
            where = f"on stderr ({self._stacks_file} cannot be written: {error.strerror})"
            faulthandler.dump_traceback(2, all_threads=True)
        self._write_heartbeat(silent)
        self._say(
            f"{what}: it ends; where each thread was is {where}. If that was work and no hang, raise"
            f" trainer.hang_minutes={self._minutes:g}"
        )
        time.sleep(LINGER_S)
        os._exit(1)

    def _write_heartbeat(self, silent: float) -> None:
        """Overwrite the heartbeat file, which others may be reading, in one write."""
        if self._heartbeat < 0:
            return
        now = time.time()
        heart: dict[str, Any] = {
            "rank": self._rank,
            "host": platform.node(),
            "pid": os.getpid(),
            "step": _pulse.step,
            "doing": _pulse.doing,
            "beat": round(now - silent, 1),
            "written": round(now, 1),
        }
        try:
            os.pwrite(self._heartbeat, f"{json.dumps(heart):<{_HEARTBEAT_BYTES - 1}}\n".encode(), 0)
        except OSError as error:
            self._say(f"{self._heartbeat_file} cannot be written any more: {error.strerror}")
            self._heartbeat = -1

    def _say(self, text: str) -> None:
        # Not through sys.stderr: the thread that hangs may hold its lock.
        with suppress(OSError):
            os.write(2, f"megabase: {text}\n".encode())
