"""PostgreSQL as MLflow's store: points that are sent again are stored once there, too."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow.entities import Metric

from megabase.pipeline.tracking.points import Points
from megabase.pipeline.tracking.sender import BATCH, Sender
from megabase.pipeline.tracking.server import Server
from tests.pipeline.tracking.conftest import make_run
from tests.pipeline.tracking.runs import expected, history, runs_of, write

pytestmark = pytest.mark.slow


def programs() -> Path | None:
    """The directory of PostgreSQL's server programs; None if they are not installed."""
    found = shutil.which("pg_ctl")
    places = sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"))
    return Path(found).parent if found else places[-1].parent if places else None


@pytest.fixture
def store() -> Iterator[str]:
    """URI of a database on a server of its own, which only a socket in its directory reaches."""
    binaries = programs()
    if binaries is None:
        pytest.skip("PostgreSQL is not installed (apt-get install postgresql)")
    pytest.importorskip("psycopg2", reason="psycopg2-binary is not installed")
    # The server refuses to run as root, and a socket's path may have 107 characters.
    as_user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    with tempfile.TemporaryDirectory(prefix="pg-", dir="/tmp") as temporary:
        if as_user:
            shutil.chown(temporary, "postgres")
        data = f"{temporary}/data"

        def call(*command: str) -> None:
            subprocess.run([*as_user, *command], check=True, capture_output=True, cwd=temporary, timeout=120)

        call(f"{binaries}/initdb", "--pgdata", data, "--auth", "trust", "--username", "test", "--no-sync")
        options = f"-c listen_addresses= -c unix_socket_directories={temporary} -c fsync=off"
        control = [f"{binaries}/pg_ctl", "--pgdata", data, "--wait", "--log", f"{temporary}/log"]
        call(*control, "--options", options, "start")
        try:
            yield f"postgresql+psycopg2://test@/postgres?host={temporary}"
        finally:
            call(*control, "--mode", "immediate", "stop")


def test_points_that_are_sent_twice_are_stored_once(store: str, tmp_path: Path) -> None:
    run = make_run(tmp_path, store, "e")
    write(run, 1, 300)
    Sender(run, run.directory, Server.of(run)).send("RUNNING", complete=True)
    write(run, 251, 400, again=1000.0)
    Sender(run, run.directory, Server.of(run)).send("FINISHED", complete=True)
    (found,) = runs_of(store, "e")
    # As a process does whose last request was stored, but not answered.
    again = [Metric(*point) for point in Points(run.directory).new(complete=True) if point.step > 200]
    for first in range(0, len(again), BATCH):
        Server.of(run).client().log_batch(found.info.run_id, metrics=again[first : first + BATCH])
    points = history(store, found.info.run_id)
    assert points[:300] == expected(1, 300) and [point[0] for point in points] == list(range(1, 401))
    assert found.info.status == "FINISHED"
