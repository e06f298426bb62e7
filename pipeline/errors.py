"""Errors with a message for the user, which the command line prints as one line."""


class UserError(Exception):
    """An argument, setting or input is wrong: printed as one line on stderr, exit code 2."""


class RunError(Exception):
    """A run failed for a reason that one line explains: printed on stderr, exit code 1.

    Attributes:
        temporary: whether another start may succeed, as after an outage of a file server.
    """

    def __init__(self, message: str, *, temporary: bool = False) -> None:
        super().__init__(message)
        self.temporary = temporary


def first_line(error: BaseException) -> str:
    """The first line of an error's message; the name of its type if it has none."""
    message = str(error).strip()
    return message.splitlines()[0] if message else type(error).__name__
