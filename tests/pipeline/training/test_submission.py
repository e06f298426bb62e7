"""What is checked before a job is queued."""

import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from megabase.pipeline.config.load import load
from megabase.pipeline.config.schema import RunConfig
from megabase.pipeline.errors import UserError
from megabase.pipeline.slurm.partition import Partition
from megabase.pipeline.training import submission
from megabase.pipeline.training.submission import check_submission, unreachable
from tests.conftest import train_settings

CALL = ["sbatch", "--nodes=2", "--partition=gpu", "script"]


@pytest.fixture(autouse=True)
def cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submission, "partitions", lambda: [Partition("gpu", True, True, None, 2)])


def config(shards: Path, root: Path, *more: str) -> RunConfig:
    return load([], train_settings(shards, root, "a", *more))


def test_what_is_found(lambda_shards: Path, tmp_path: Path) -> None:
    found = check_submission(config(lambda_shards, tmp_path, "slurm.gpus=null"), CALL, 4)
    assert [each.what for each in found] == [
        "shards",
        "batch",
        "run directory",
        "disk",
        "partition",
        "plan",
        "MLflow",
    ]
    texts = {each.what: each.text for each in found}
    assert texts["shards"] == f"{lambda_shards}: 85 training windows of 512 bases"
    assert texts["batch"] == "8 windows = 4 ranks x 2 of a micro batch x 1 accumulated"
    assert texts["run directory"] == f"{tmp_path}/a can be written"
    assert texts["disk"].startswith("up to 4 checkpoints of ") and f" free in {tmp_path}" in texts["disk"]
    assert texts["partition"] == "gpu: 2 nodes, no time limit"
    assert texts["MLflow"] == f"sqlite:///{tmp_path}/mlflow.db"
    assert not any(each.warning for each in found) and not list(tmp_path.iterdir())


def test_no_room_for_all_checkpoints_that_are_kept(lambda_shards: Path, tmp_path: Path) -> None:
    run = config(lambda_shards, tmp_path, "trainer.max_steps=2000000000000", "checkpoint.keep_every=5")
    with pytest.raises(
        UserError, match=r"the run keeps up to 400000000004 checkpoints .* free: make room, choose"
    ):
        check_submission(run, CALL, 4)


def test_a_partition_without_enough_nodes(lambda_shards: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"trainer\.nodes=3: partition gpu has 2"):
        check_submission(config(lambda_shards, tmp_path), ["sbatch", "--nodes=3"], 4)


def test_a_server_that_does_not_answer_is_a_warning(lambda_shards: Path, tmp_path: Path) -> None:
    with socket.socket() as closed:  # bound, but nobody listens
        closed.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{closed.getsockname()[1]}"
        found = check_submission(config(lambda_shards, tmp_path, f"tracking.uri={uri}"), CALL, 4)
    assert found[-1].warning and found[-1].text.startswith(f"{uri} does not answer from here (")
    assert "check tracking.uri" in found[-1].text
    off = config(lambda_shards, tmp_path, f"tracking.uri={uri}", "tracking.enabled=false")
    assert "MLflow" not in [each.what for each in check_submission(off, CALL, 4)]


def test_a_step_beyond_an_epoch_is_a_warning(lambda_shards: Path, tmp_path: Path) -> None:
    found = check_submission(
        config(lambda_shards, tmp_path, "data.global_batch=88", "slurm.gpus=null"), CALL, 4
    )
    assert [each.what for each in found if each.warning] == ["batch"]


@pytest.mark.parametrize(
    ("slurm", "fatal"),
    [
        (["slurm.gpus=h100"], True),
        (["slurm.gpus=any"], False),  # an H100 is a guess
        (["slurm.gpus=null", "slurm.mem=64G"], True),
    ],
)
def test_a_run_that_does_not_fit_is_refused_if_its_memory_is_known(
    slurm: list[str], fatal: bool, lambda_shards: Path, tmp_path: Path
) -> None:
    large = ["model.dim=4096", "data.length=32768", "data.micro_batch=64", "data.global_batch=256"]
    run = config(lambda_shards, tmp_path, *large, *slurm, "trainer.devices=4")
    found = [each for each in check_submission(run, CALL, 4) if each.what == "plan"]
    assert (found[0].fatal, found[0].warning) == (fatal, True)
    assert "the run does not fit: a rank needs" in found[0].text
    assert ": it would with data.micro_batch=" in found[0].text
    assert ("--force" in found[0].text) == fatal


@pytest.mark.parametrize("slurm", ["slurm.gpus=null", "slurm.gpus=v9"])
def test_a_run_on_hardware_of_unknown_memory_is_not_refused(
    slurm: str, lambda_shards: Path, tmp_path: Path
) -> None:
    large = ["data.micro_batch=1048576", "data.global_batch=1048576", "trainer.devices=1"]
    run = config(lambda_shards, tmp_path, *large, slurm)
    found = [each for each in check_submission(run, CALL, 1) if each.what == "plan"]
    assert not any(each.fatal for each in found)


@pytest.mark.parametrize("code", [200, 403])
def test_a_server_answers_also_with_an_error(code: int) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(code)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        assert unreachable(f"http://127.0.0.1:{server.server_port}/") is None


def test_a_server_that_says_nothing_is_not_waited_for() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert unreachable(uri, timeout_s=0.2) in ("no answer in 0.2 s", "timed out")
    assert unreachable("http://[broken") is not None
