"""A check of URIs among the settings: every setting is written to files and logs, so none may hold a password."""

from __future__ import annotations

from urllib.parse import parse_qs, urlsplit

from megabase.pipeline.errors import UserError

WEB = ("http", "https")
_SECRET_PARAMETERS = {"password", "passwd", "token"}


def refuse_credentials(name: str, uri: str) -> None:
    """Check that the URI of a tracking server holds no user name or password. A database URI may hold a user name.

    Args:
        name: of the setting or environment variable, for the message. The message does not hold the URI.
        uri: to check.

    Raises:
        UserError: it holds one, or is not a URI.
    """
    try:
        parts = urlsplit(uri)
    except ValueError:
        raise UserError(f"{name} is not a URI, such as http://HOST:PORT or sqlite:///PATH") from None
    user, _, password = parts.netloc.rpartition("@")[0].partition(":")
    is_web = parts.scheme in WEB
    secrets = _SECRET_PARAMETERS & {key.lower() for key in parse_qs(parts.query)}
    if not (password or secrets or (user and is_web)):
        return
    way_out = (
        "set the environment variables MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
        if is_web
        else "put it into a file of the database's client, such as ~/.pgpass"
    )
    raise UserError(
        f"{name} holds a user name or password, and the run directory and its logs would show it: take it out, and"
        f" {way_out}"
    )
