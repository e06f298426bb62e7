"""Being told to stop: a flag that signals, a STOP file or the clock set, from the first moment of a process on.

Nothing happens in the signal frame. What the flag leads to is agreed between ranks (`agreement.py`) and done
between two steps (`callback.py`). This module imports nothing heavy: the handlers must be there before the seconds
that importing torch takes.
"""

from __future__ import annotations

import signal
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

# `megabase train` leaves with this code (EX_TEMPFAIL) when it has checkpointed and wants to be started again.
EXIT_AGAIN = 75
# Its exit code after a second Ctrl-C, as of any program that SIGINT ends.
INTERRUPTED = 130
# A file of this name in the run directory stops the run, and keeps it from starting again while it is there.
STOP_FILE = "STOP"
# Seconds between two looks for it: each is a question to the file server.
POLL_S = 1.0


class StopRequest:
    """A flag. Setting it twice changes nothing, but for a second Ctrl-C: that interrupts.

    reason: who asked first, "" before anyone has. by_person: a STOP file asks, so nobody should start the run again.
    minutes: after so many since this process began, the clock asks, if someone watches (0: never).
    """

    def __init__(self) -> None:
        # Plain data, because a handler may interrupt another and must take no lock.
        self.reason = ""
        self.by_person = False
        self.minutes = 0.0
        self._interrupted = False
        self._began = time.monotonic()

    def listen(self) -> StopRequest:
        """Take over SIGTERM, SIGUSR1 and SIGINT of this process, from now until it ends."""
        for signum in STOP_SIGNALS:
            signal.signal(signum, self._handle)
        # A supervisor starts its ranks with these signals held back: one that came meanwhile is delivered now.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        return self

    def watch(self, file: Path) -> None:
        """Look about once a second for `file`, and at the clock.

        In a thread of its own, so that a slow file server delays no step. For one rank: the others agree with it.
        """
        threading.Thread(target=self._watch, args=(file,), name="stop", daemon=True).start()

    def __bool__(self) -> bool:
        return bool(self.reason)

    def _watch(self, file: Path) -> None:
        while not self.by_person:
            with suppress(OSError):  # a file server that is unwell is no wish to stop
                self.by_person = file.exists()
            if self.by_person:
                self.reason = self.reason or str(file)
            if self.minutes and time.monotonic() - self._began > self.minutes * 60:
                self.reason = self.reason or f"trainer.max_minutes={self.minutes:g}"
            time.sleep(POLL_S)

    def _handle(self, signum: int, _frame: FrameType | None) -> None:
        if signum == signal.SIGINT:
            if self._interrupted:
                raise KeyboardInterrupt
            self._interrupted = True
        self.reason = self.reason or signal.Signals(signum).name
