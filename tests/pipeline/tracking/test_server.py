"""Which MLflow server a run is sent to."""

from pathlib import Path

import pytest

from megabase.pipeline.config.load import load
from megabase.pipeline.config.schema import RunConfig
from megabase.pipeline.errors import UserError
from megabase.pipeline.tracking.server import Server


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    return load([], ["run.name=x", "data.shards=s", f"run.root={tmp_path}"])


def test_settings_win_over_the_environment_and_that_over_the_default(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    default = Server(f"sqlite:///{tmp_path}/mlflow.db", "megabase", f"file://{tmp_path}/mlartifacts")
    assert Server.of(config) == default and not default.has_database()
    known = {"uri": "http://before", "experiment": "b"}
    assert Server.of(config, known) == Server("http://before", "b")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://environment")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "e")
    assert Server.of(config, known) == Server("http://environment", "e")
    config.tracking.uri, config.tracking.experiment = "http://setting", "s"
    assert Server.of(config, known) == Server("http://setting", "s")


def test_a_password_in_the_environment_is_refused(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:secret@host")
    with pytest.raises(UserError, match="MLFLOW_TRACKING_URI holds a user name or password") as caught:
        Server.of(config)
    assert "secret" not in str(caught.value)
