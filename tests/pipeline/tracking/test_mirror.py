"""The MLflow mirror against a real server: one that starts late, and one that never starts; a restart of the run."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from megabase.pipeline.config.load import load
from megabase.pipeline.config.schema import RunConfig
from megabase.pipeline.rundir.journal import Journal
from megabase.pipeline.rundir.paths import RunPaths
from megabase.pipeline.tracking.mirror import Mirror, is_complete

pytestmark = pytest.mark.slow


def test_a_finished_run_is_complete_in_mlflow_if_its_file_says_so_of_this_server(tmp_path: Path) -> None:
    run = load([], ["run.name=x", "data.shards=s", f"run.root={tmp_path}", "tracking.uri=http://here"])
    run.directory.mkdir()
    known = {"uri": "http://here", "experiment": "megabase", "key": "k", "run_id": "1"}
    for content, complete in (
        ({**known, "status": "FINISHED"}, True),
        ({**known, "status": "KILLED"}, False),
        (known, False),
        ({**known, "status": "FINISHED", "uri": "http://there"}, False),
        ([], False),
    ):
        RunPaths(run.directory).mlflow.write_text(json.dumps(content))
        assert is_complete(run) == complete, content
    run.tracking.uri = None
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    RunPaths(run.directory).mlflow.write_text(json.dumps({**known, "uri": uri, "status": "FINISHED"}))
    assert not is_complete(run)  # the database is gone
    (tmp_path / "mlflow.db").touch()
    assert is_complete(run)


class Server:
    """`mlflow server` on sqlite."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)),
                *("--workers", "1", "--backend-store-uri", f"sqlite:///{self.directory}/server.db"),
                *("--artifacts-destination", str(self.directory / "artifacts")),
            ],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=5):
                    return
            except OSError:
                time.sleep(0.2)
        pytest.fail("the MLflow server did not start")

    def stop(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    made = Server(tmp_path)
    yield made
    made.stop()


def settings(tmp_path: Path, uri: str) -> RunConfig:
    made = load(
        [],
        [
            "run.name=r",
            "data.shards=s",
            f"run.root={tmp_path}",
            f"tracking.uri={uri}",
            "tracking.experiment=e",
        ],
    )
    made.directory.mkdir(exist_ok=True)
    return made


def rows(first: int, last: int) -> list[dict[str, float]]:
    return [{"step": step, "loss": 2.0 / step, "samples": "00"} for step in range(first, last + 1)]


def history(client: MlflowClient, run_id: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in client.get_metric_history(run_id, "loss")]


def test_a_server_that_starts_late_gets_everything_once_and_in_order(
    tmp_path: Path, server: Server, capfd: pytest.CaptureFixture[str]
) -> None:
    run = settings(tmp_path, server.uri)
    run.data.mixture = {"gi|1|*": 2.0, "human.fa": 1.0}
    journal = Journal(run.directory / "metrics.jsonl", 0)
    journal.append(rows(1, 30))
    mirror = Mirror(run, run.directory).start()
    deadline = time.monotonic() + 60
    message = ""
    while "training goes on" not in message and time.monotonic() < deadline:
        time.sleep(0.1)
        message += capfd.readouterr().err
    assert "does not take metrics" in message and message.count("\n") == 1

    server.start()
    journal.append(rows(31, 2500))  # more than one call takes
    assert mirror.finish("KILLED", timeout_s=120)
    client = MlflowClient(server.uri)
    (experiment,) = [e for e in client.search_experiments() if e.name == "e"]
    (first,) = client.search_runs([experiment.experiment_id])
    assert first.info.status == "KILLED" and first.info.run_name == "r"
    assert first.data.params["data.length"] == "8192"
    assert json.loads(first.data.params["data.mixture"]) == run.data.mixture
    assert history(client, first.info.run_id) == [(row["step"], row["loss"]) for row in rows(1, 2500)]

    # As if the process died before it wrote the id of the MLflow run: the run is found by its key.
    known = json.loads((RunPaths(run.directory).mlflow).read_text())
    (RunPaths(run.directory).mlflow).write_text(json.dumps({**known, "run_id": None}))
    run.optim.lr = 7.0

    # A restart from a checkpoint at step 2000: the journal gets the later rows again, and then new ones.
    journal = Journal(run.directory / "metrics.jsonl", 2000)
    again = Mirror(run, run.directory).start()
    journal.append(rows(2001, 2600))
    assert again.finish("FINISHED", timeout_s=120)
    (second,) = client.search_runs([experiment.experiment_id])
    assert second.info.run_id == first.info.run_id and second.info.status == "FINISHED"
    assert history(client, second.info.run_id) == [(row["step"], row["loss"]) for row in rows(1, 2600)]
    assert second.data.params["optim.lr"] == "0.001" and second.data.tags["changed.optim.lr"] == "7.0"


def test_a_server_that_never_starts_delays_only_the_end(tmp_path: Path, server: Server) -> None:
    run = settings(tmp_path, server.uri)
    Journal(run.directory / "metrics.jsonl", 0).append(rows(1, 3))
    mirror = Mirror(run, run.directory).start()
    assert not mirror.finish("FINISHED", timeout_s=1)
    assert json.loads((RunPaths(run.directory).mlflow).read_text())["run_id"] is None
