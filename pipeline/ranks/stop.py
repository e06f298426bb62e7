"""Requests to stop: a flag that a signal, a STOP file or a time limit sets.

A signal handler only sets the flag. The ranks agree on a step to stop at (`agreement.py`), and the training callback
stops between two steps. This module imports nothing heavy: the handlers must be set before the seconds that importing
torch takes.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType

# The supervisor passes a Ctrl-C on as this signal. It cannot take SIGINT: a terminal sends that to the ranks as well,
# and a second one interrupts them.
CTRL_C = signal.SIGUSR2
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, CTRL_C)
# What set the flag, for people.
REASONS = {
    signal.SIGTERM: "SIGTERM",
    signal.SIGUSR1: "SIGUSR1",
    signal.SIGINT: "Ctrl-C (SIGINT)",
    CTRL_C: "Ctrl-C (SIGINT)",
}
# The answer to the first Ctrl-C.
ANSWER = "stopping after this step, with a checkpoint; press Ctrl-C again to end now"

# Exit code of `megabase train` when it has written a checkpoint and should be started again (EX_TEMPFAIL).
EXIT_AGAIN = 75
# Exit code after a second Ctrl-C: 128 + SIGINT, as for any program that SIGINT ends.
INTERRUPTED = 130
# Seconds between two checks for the STOP file: each is a request to the file server.
POLL_S = 1.0


class StopRequest:
    """A flag: true after the first request to stop. Later requests change nothing, but a second Ctrl-C interrupts.

    Args:
        answers: this is the process that a user started: it answers the first Ctrl-C at once, and each later one
            interrupts it. A rank is interrupted once, so that it can write its status.

    Attributes:
        reason: what set the flag first: one of REASONS, the STOP file's path or the setting `trainer.max_minutes`.
        by_person: whether the STOP file exists. Then no job script should start the run again.
        minutes: time limit, counted from the construction of this object, at which `watch` sets the flag; 0: none.
    """

    def __init__(self, *, answers: bool = False) -> None:
        # Plain attributes: a handler may interrupt another handler and must take no lock.
        self.reason = ""
        self.by_person = False
        self.minutes = 0.0
        self._answers = answers
        self._presses = 0  # of Ctrl-C
        self._began = time.monotonic()

    def listen(self) -> StopRequest:
        """Handle STOP_SIGNALS of this process, from now until it ends; returns itself."""
        for signum in STOP_SIGNALS:
            signal.signal(signum, self._handle)
        # A supervisor starts its ranks with these signals blocked: a signal that arrived meanwhile is delivered now.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        return self

    def watch(self, file: Path) -> None:
        """Check about once a second for a STOP file, and for the time limit `minutes`.

        Call it on one rank; `agreement.py` passes the request to the others. A thread does it, so that a slow file
        server does not delay a step.
        """
        threading.Thread(target=self._watch, args=(file,), name="stop", daemon=True).start()

    def __bool__(self) -> bool:
        return bool(self.reason)

    def _watch(self, file: Path) -> None:
        while not self.by_person:
            with suppress(OSError):  # an error of the file server is not a request to stop
                self.by_person = file.exists()
            if self.by_person:
                self.reason = self.reason or str(file)
            if self.minutes and time.monotonic() - self._began > self.minutes * 60:
                self.reason = self.reason or f"trainer.max_minutes={self.minutes:g}"
            time.sleep(POLL_S)

    def _handle(self, signum: int, _frame: FrameType | None) -> None:
        self.reason = self.reason or REASONS[signal.Signals(signum)]
        if signum == CTRL_C:
            self._presses = max(self._presses, 1)
        elif signum == signal.SIGINT:
            self._presses += 1
            if self._presses == 1 and self._answers:
                # Not through `logging`: this may interrupt a thread that holds its lock.
                os.write(2, f"{chr(10) * os.isatty(2)}megabase: {ANSWER}\n".encode())
            elif self._presses == 2 or (self._presses > 2 and self._answers):
                raise KeyboardInterrupt
