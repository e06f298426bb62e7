"""SLURM, MLflow and shards: there, missing, and broken."""

import re
import shutil
import stat
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from megabase.pipeline.config.load import load
from megabase.pipeline.config.schema import RunConfig
from megabase.pipeline.doctor.finding import NOTE, OK, WRONG
from megabase.pipeline.doctor.services import COMMANDS, check_mlflow, check_shards, check_slurm, nvme_finding


def config(*settings: str) -> RunConfig:
    return load([], settings, {"run": {"name": "x"}, "data": {"shards": ""}})


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """SLURM's commands as scripts that print nothing; `sinfo` prints two partitions, or fails."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in COMMANDS:
        script(folder / name, "")
    partitions = r"gpu*|up|2-00:00:00|4\nold|down|infinite|1\n"
    script(folder / "sinfo", f'[ "$1" = --version ] && echo slurm 22.05.8 || printf "{partitions}"')
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv("SLURM_CONF", raising=False)
    return folder


def script(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_slurm_and_its_partitions(programs: Path) -> None:
    slurm, sacct = check_slurm(config())
    assert slurm.state == OK
    assert slurm.text == "slurm 22.05.8; gpu* (4 nodes, 48:00:00), old (1 node, no time limit, not up)"
    assert sacct.state == NOTE
    found = check_slurm(config("slurm.partition=a100"))[1]
    assert (found.state, found.text) == (WRONG, "slurm.partition=a100: there is no a100")
    assert found.way_out == "choose one of gpu, old"


def test_slurm_that_is_not_there_or_broken(programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(programs / "sinfo", "echo sinfo: error: unable to contact controller >&2; exit 1")
    monkeypatch.setenv("SLURM_CONF", str(programs / "none.conf"))
    assert check_slurm(config())[0].state == NOTE  # no cluster is configured
    (programs / "none.conf").touch()
    [found] = check_slurm(config())
    assert found.state == WRONG and "unable to contact controller" in found.text
    (programs / "sbatch").unlink()
    [found] = check_slurm(config())
    assert (found.state, found.text) == (WRONG, "sbatch: not found on PATH")
    assert check_slurm(config(), lambda _: None)[0].state == NOTE


@pytest.fixture
def server() -> Iterator[str]:
    """A server that answers every request; its clock is right."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    httpd = HTTPServer(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=httpd.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()
    thread.join()
    httpd.server_close()


def test_mlflow(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert [each.state for each in check_mlflow(config(f"tracking.uri={server}"))] == [OK]
    _, clock = check_mlflow(config(f"tracking.uri={server}"), lambda: time.time() + 100)
    assert clock.state == WRONG
    assert re.fullmatch(r"MLflow's server is -(99|100|101) s from this machine's clock", clock.text)
    [away] = check_mlflow(config("tracking.uri=http://127.0.0.1:9"))
    assert away.state == NOTE and "does not answer" in away.text and "megabase sync" in away.way_out
    assert check_mlflow(config())[0].text.startswith("no server: runs go to the database ")
    assert check_mlflow(config("tracking.enabled=false"))[0].state == NOTE
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@host")
    [found] = check_mlflow(config())
    assert found.state == WRONG and "secret" not in found.text


def test_shards_and_nvme(lambda_shards: Path, tmp_path: Path) -> None:
    assert check_shards(config()) == [] and nvme_finding(config()) == []
    [found] = check_shards(config(f"data.shards={lambda_shards}"))
    assert found.state == OK and "48,502 letters; splits: train, valid" in found.text
    copied = tmp_path / "shards"
    shutil.copytree(lambda_shards, copied)
    (copied / "index.parquet").write_bytes(b"half")
    [found] = check_shards(config(f"data.shards={copied}"))
    assert found.state == WRONG and "index.parquet" in found.text
    more = ["zero.stage=3", "zero.offload=nvme"]
    [found] = nvme_finding(config(*more, f"zero.nvme_path={tmp_path / 'disk'}"))
    assert found.state == OK
    (tmp_path / "file").touch()
    [found] = nvme_finding(config(*more, f"zero.nvme_path={tmp_path / 'file' / 'disk'}"))
    assert found.state == WRONG
