"""Messages to the user: the logger `megabase` and its children, on stderr. stdout belongs to the results of commands.

Only the command line calls `set_up`. A program that imports megabase sets up logging itself; without that, these
messages are dropped (`megabase/__init__.py` adds a NullHandler).
"""

from __future__ import annotations

import functools
import logging
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

# The logger of progress lines of a training run. They are printed without the prefix `megabase: `.
PROGRESS = logging.getLogger("megabase.progress")


@functools.cache
def console() -> Console:
    """The terminal on stderr. Messages and progress bars share it, so that a message does not tear a bar."""
    from rich.console import Console  # not at the top: a message to a file or pipe needs no rich

    return Console(stderr=True)


class StderrHandler(logging.Handler):
    """Writes each message to stderr at once: as plain lines to a file or pipe, beside a progress bar on a terminal.

    It looks up `sys.stderr` for every message, so it also works after another stream has replaced it.
    """

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = self.format(record)
            if sys.stderr.isatty():
                # soft_wrap: the terminal wraps long lines, so that a path can be copied in one piece.
                console().print(text, soft_wrap=True, markup=False, highlight=False)
            else:
                print(text, file=sys.stderr, flush=True)
        except Exception:
            self.handleError(record)


class Prefixed(logging.Formatter):
    """Formats a message as `megabase: TEXT`, and a progress line as `TEXT`. The traceback, if any, follows."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.name == PROGRESS.name else f"megabase: {text}"


def set_up() -> None:
    """Show the messages of the logger `megabase`, level INFO and above, on stderr. A second call changes nothing."""
    logger = logging.getLogger("megabase")
    if any(isinstance(handler, StderrHandler) for handler in logger.handlers):
        return
    handler = StderrHandler()
    handler.setFormatter(Prefixed())
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    # A library may add a handler to the root logger, which would show each message twice.
    logger.propagate = False
