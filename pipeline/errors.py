"""Errors whose message is for the user: the command line prints them as one line and leaves."""

import os


class UserError(Exception):
    """Something the user gave is wrong: printed as one line on stderr, exit code 2."""


class RunError(Exception):
    """The run failed for a reason that can be said in one line: printed on stderr, exit code 1.

    passing: another start may well not meet it, as when a file server was away for a moment.
    """

    def __init__(self, message: str, *, passing: bool = False) -> None:
        super().__init__(message)
        self.passing = passing


# For a message's end.
GOES_ON = "the same command goes on from the newest checkpoint, or begins where there is none"


def rank_zero() -> bool:
    """Whether this process speaks for the run: rank 0 of a launcher, task 0 of a SLURM step, or the only one."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))) == 0


def first_line(error: BaseException) -> str:
    """The first line of an error's message; the name of its type if it has none."""
    message = str(error).strip()
    return message.splitlines()[0] if message else type(error).__name__
