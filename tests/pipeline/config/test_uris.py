"""URIs with a user name or password are refused, and not shown."""

import pytest

from megabase.pipeline.config.load import load
from megabase.pipeline.config.uris import refuse_credentials
from megabase.pipeline.errors import UserError


@pytest.mark.parametrize(
    "uri",
    [
        "http://host:5000",
        "https://host/path?x=1",
        "sqlite:///a@b.db",
        "postgresql://user@host/db",
        "databricks",
        "databricks://profile",
    ],
)
def test_a_uri_without_a_password(uri: str) -> None:
    refuse_credentials("tracking.uri", uri)


@pytest.mark.parametrize(
    ("uri", "way_out"),
    [
        ("http://me:hunter2@host", "MLFLOW_TRACKING_PASSWORD"),
        ("https://hunter2@host", "MLFLOW_TRACKING_TOKEN"),
        ("http://host?token=hunter2", "MLFLOW_TRACKING_TOKEN"),
        ("postgresql://me:hunter2@host/db", "pgpass"),
        ("mysql://host/db?Password=hunter2", "file of the database's client"),
        ("http://[hunter2", "is not a URI"),
    ],
)
def test_a_uri_with_a_password(uri: str, way_out: str) -> None:
    with pytest.raises(UserError, match=way_out) as caught:
        load([], ["run.name=x", "data.shards=s", f"tracking.uri={uri}"])
    assert "hunter2" not in str(caught.value)
