"""Errors whose message is for the user: the command line prints them as one line and leaves."""


class UserError(Exception):
    """Something the user gave is wrong: printed as one line on stderr, exit code 2."""


class RunError(Exception):
    """The run failed for a reason that can be said in one line: printed on stderr, exit code 1."""
