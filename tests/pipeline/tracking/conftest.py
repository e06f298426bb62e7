"""One MLflow server for all tests of this folder, a proxy for each test, and runs to send."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from megabase.pipeline.config.load import load, save
from megabase.pipeline.config.schema import RunConfig
from megabase.pipeline.rundir.paths import RunPaths
from tests.pipeline.tracking.servers import Proxy, Server


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A running server."""
    made = Server(tmp_path_factory.mktemp("mlflow"))
    made.start()
    yield made
    made.stop()


@pytest.fixture
def proxy(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy before the server. Clients wait 15 s for an answer."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "15")
    made = Proxy(server.port)
    yield made
    made.stop()


@pytest.fixture
def run(proxy: Proxy, tmp_path: Path) -> RunConfig:
    """A run directory without rows, whose MLflow is the proxy, in an experiment of its own."""
    return make_run(tmp_path, proxy.uri, tmp_path.name)


def make_run(root: Path, uri: str | None, experiment: str | None, name: str = "r") -> RunConfig:
    """A run directory with `config.yaml`."""
    config = load([], [f"run.name={name}", "data.shards=s", f"run.root={root}"])
    config.tracking.uri, config.tracking.experiment = uri, experiment
    config.directory.mkdir(parents=True)
    save(config, RunPaths(config.directory).config)
    return config
