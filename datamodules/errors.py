"""The exception for data that cannot be used."""


class DataError(ValueError):
    """Input, shards or data settings are wrong.

    The message is one line for the user: what is wrong, where, with which value, and what to do. A bug raises another
    exception.
    """
