"""The one exception for data that cannot be used."""


class DataError(ValueError):
    """Input, shards or data settings that cannot work.

    The message is one line for the user: what is wrong, where, with which value, and the way out.
    Bugs raise something else.
    """
