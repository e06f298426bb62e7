"""Being told to stop: a flag that signals set, from the first moment of a process on.

Nothing happens in the signal frame. What the flag leads to is agreed between ranks (`agreement.py`) and done
between two steps (`loop.py`). This module imports nothing heavy: the handlers must be there before the seconds
that importing torch takes.
"""

from __future__ import annotations

import signal
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

# `megabase train` leaves with this code (EX_TEMPFAIL) when it has checkpointed and wants to be started again.
EXIT_AGAIN = 75


class StopRequest:
    """A flag that signals set. Setting it twice changes nothing, but for a second Ctrl-C: that interrupts."""

    def __init__(self) -> None:
        # The name of the signal; plain data, because a handler may interrupt another and must take no lock.
        self.reason = ""

    def listen(self) -> StopRequest:
        """Take over SIGTERM, SIGUSR1 and SIGINT of this process, from now until it ends."""
        for signum in STOP_SIGNALS:
            signal.signal(signum, self._handle)
        # A supervisor starts its ranks with these signals held back: one that came meanwhile is delivered now.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        return self

    def __bool__(self) -> bool:
        return bool(self.reason)

    def _handle(self, signum: int, _frame: FrameType | None) -> None:
        if signum == signal.SIGINT and self.reason == "SIGINT":
            raise KeyboardInterrupt
        self.reason = self.reason or signal.Signals(signum).name
