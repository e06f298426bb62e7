"""The MLflow mirror against a real server, through a proxy that loses, delays or refuses."""

import json
import logging
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from megabase.pipeline.config.load import load
from megabase.pipeline.config.schema import RunConfig
from megabase.pipeline.rundir.journal import Journal
from megabase.pipeline.rundir.paths import RunPaths
from megabase.pipeline.tracking import mirror as mirror_module
from megabase.pipeline.tracking.mirror import Mirror, is_complete
from tests.pipeline.checkpoints import write_checkpoint
from tests.pipeline.tracking.runs import expected, history, rows, runs_of, time_of, write
from tests.pipeline.tracking.servers import FAIL, LOSE, PASS, REFUSE, Proxy, Server, once

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("mlflow")]


def test_a_finished_run_is_complete_in_mlflow_if_its_file_says_so_of_this_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://there")
    assert not is_complete(run)


def test_outages_at_start_in_the_middle_and_at_the_end(
    run: RunConfig,
    proxy: Proxy,
    server: Server,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mirror_module, "LONGEST_PAUSE_S", 1.0)
    caplog.set_level(logging.INFO, "megabase")
    proxy.behave = lambda path: REFUSE
    write(run, 1, 30)
    mirror = Mirror(run, run.directory).start()
    wait(lambda: "does not take metrics" in caplog.text)
    proxy.behave = lambda path: PASS
    wait(lambda: "takes metrics again" in caplog.text)
    assert len(history(server.uri, only(server, run).info.run_id)) == 30

    proxy.behave = lambda path: FAIL if path == "runs/log-batch" else PASS
    write(run, 31, 2500)  # more than one call takes
    wait(lambda: "answers with error 500" in caplog.text)
    assert not mirror.finish("FINISHED", timeout_s=0.1)
    assert only(server, run).info.status == "RUNNING"
    proxy.behave = once("runs/log-batch", LOSE)
    assert mirror.finish("FINISHED", timeout_s=60)
    found = only(server, run)
    assert found.info.status == "FINISHED" and found.info.run_name == "r"
    assert found.data.params["data.length"] == "8192"
    assert history(server.uri, found.info.run_id) == expected(1, 2500)
    assert found.info.start_time == round(time_of(0) * 1000)
    assert is_complete(run)


def test_a_resume_goes_on_in_the_same_run_and_asks_for_no_history(
    run: RunConfig, proxy: Proxy, server: Server
) -> None:
    run.data.mixture = {"gi|1|*": 2.0, "human.fa": 1.0}
    write(run, 1, 40)
    assert Mirror(run, run.directory).start().finish("KILLED", timeout_s=60)
    first = only(server, run)
    assert first.info.status == "KILLED"
    assert json.loads(first.data.params["data.mixture"]) == run.data.mixture

    # As if the process died before it wrote the id of the MLflow run: the run is found by its key.
    known = json.loads((RunPaths(run.directory).mlflow).read_text())
    (RunPaths(run.directory).mlflow).write_text(json.dumps({**known, "run_id": None}))
    run.optim.lr = 7.0
    proxy.paths.clear()
    write(run, 31, 60, again=1000.0)  # from a checkpoint at step 30
    assert Mirror(run, run.directory).start().finish("FINISHED", timeout_s=60)
    second = only(server, run)
    assert second.info.run_id == first.info.run_id and second.info.status == "FINISHED"
    points = history(server.uri, second.info.run_id)
    assert [point[0] for point in points] == list(range(1, 61))
    assert points[:40] == expected(1, 40)  # those of the first pass
    assert points[40][2] == round(time_of(41, again=1000.0) * 1000)
    assert second.data.metrics["train/restarts"] == 1 and second.data.tags["megabase.restarts"] == "1"
    assert second.data.params["optim.lr"] == "0.001" and second.data.tags["changed.optim.lr"] == "7.0"
    assert second.data.tags["resumed.30"] == (
        "optim.lr 0.001 -> 7.0; the points of steps 31 to 40 are those of the settings before"
    )
    assert "metrics/get-history" not in proxy.paths and "runs/get" in proxy.paths, Counter(proxy.paths)


def test_a_run_whose_creation_is_not_answered_leaves_no_second_run(
    run: RunConfig, proxy: Proxy, server: Server
) -> None:
    write(run, 1, 5)
    proxy.behave = once("runs/create", LOSE)
    assert Mirror(run, run.directory).start().finish("FINISHED", timeout_s=60)
    assert history(server.uri, only(server, run).info.run_id) == expected(1, 5)


def test_a_server_that_answers_after_longer_than_the_client_waits(
    run: RunConfig, proxy: Proxy, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The requests to create the run and to store points are carried out after the client has given them up."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    delays = {"runs/create": [3.0], "runs/log-batch": [2.0, 2.0]}
    proxy.behave = lambda path: delays[path].pop() if delays.get(path) else PASS
    write(run, 1, 5)
    mirror = Mirror(run, run.directory).start()
    wait(lambda: not any(delays.values()))
    time.sleep(2.0)  # until the last delayed request has been carried out
    assert mirror.finish("FINISHED", timeout_s=60)
    assert history(server.uri, only(server, run).info.run_id) == expected(1, 5)


def test_a_server_that_answers_after_ten_seconds_is_waited_for(
    run: RunConfig, proxy: Proxy, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    """Within the time that the client waits, an answer is late, not lost: nothing is sent again."""
    proxy.behave = once("runs/log-batch", 10.0)
    write(run, 1, 5)
    mirror = Mirror(run, run.directory).start()
    wait(lambda: "runs/log-batch" in proxy.paths)
    assert not mirror.finish("FINISHED", timeout_s=1)  # the end of a training does not wait
    assert mirror.finish("FINISHED", timeout_s=60)
    assert "does not take metrics" not in caplog.text and proxy.paths.count("runs/create") == 1
    assert history(server.uri, only(server, run).info.run_id) == expected(1, 5)


def test_two_runs_begin_at_once_in_a_new_experiment(run: RunConfig, proxy: Proxy, server: Server) -> None:
    from tests.pipeline.tracking.conftest import make_run

    other = make_run(Path(run.run.root), proxy.uri, run.tracking.experiment, name="s")
    both = threading.Barrier(2)
    met: set[int] = set()

    def meet(path: str) -> str:
        if path == "experiments/create":
            with threading.Lock():
                met.add(threading.get_ident())
            both.wait(timeout=30)
        return PASS

    proxy.behave = meet
    for each in (run, other):
        write(each, 1, 5)
    mirrors = [Mirror(each, each.directory).start() for each in (run, other)]
    for mirror in mirrors:
        assert mirror.finish("FINISHED", timeout_s=60)
    assert len(met) == 2
    found = runs_of(server.uri, run.tracking.experiment)
    assert sorted(each.info.run_name for each in found) == ["r", "s"]
    for each in found:
        assert history(server.uri, each.info.run_id) == expected(1, 5)


def test_the_page_of_mlflow_has_what_it_shows(run: RunConfig, proxy: Proxy, server: Server) -> None:
    paths = RunPaths(run.directory)
    commit = "0123456789012345678901234567890123456789"
    paths.environment.write_text(
        json.dumps(
            {"commit": f"{commit}-dirty", "command": ["/bin/megabase", "train", "a.yaml"], "slurm": {}}
        )
    )
    splits = {"train": {"records": 2, "bases": 700}, "valid": {"records": 1, "bases": 90}}
    about = {"shards": "data/lambda", "identity": "00ff", "alphabet": "dna", "splits": splits}
    paths.dataset.write_text(json.dumps(about))
    paths.loss_curve.write_bytes(b"picture")
    paths.submit_script.write_text("#!/bin/bash")
    paths.pictures.mkdir()
    (paths.pictures / "memory.png").write_bytes(b"picture")
    write_checkpoint(paths.checkpoints / "step-5")
    write(run, 1, 5, markov_0_bits_per_base=2.0, full_markov_5_bits_per_base=1.9)
    for _ in range(2):  # the second start must add nothing
        assert Mirror(run, run.directory).start().finish("FINISHED", timeout_s=60)
    found = only(server, run)
    client = MlflowClient(server.uri)
    assert client.get_experiment(found.info.experiment_id).tags["mlflow.experimentKind"] == (
        "custom_model_development"
    )
    tags = found.data.tags
    assert tags["mlflow.source.name"] == "megabase train" and tags["mlflow.source.type"] == "LOCAL"
    assert tags["megabase.command"] == "megabase train a.yaml"
    assert tags["mlflow.source.git.commit"] == commit and tags["mlflow.source.git.dirty"] == "true"
    assert sorted(
        (
            each.tags[0].value,
            each.dataset.name,
            each.dataset.digest,
            json.loads(each.dataset.profile)["bases"],
        )
        for each in found.inputs.dataset_inputs
    ) == [("train", "lambda/train", "00ff", 700), ("valid", "lambda/valid", "00ff", 90)]
    assert set(found.data.metrics) == {
        "train/loss",
        "train/perplexity",
        "train/restarts",
        "speed/tokens_per_second",
    }
    assert {file.path for file in client.list_artifacts(found.info.run_id)} == {
        "checkpoints.json",
        "config.yaml",
        "environment.json",
        "loss.png",
        "pictures",
        "submit.sbatch",
    }
    assert [file.path for file in client.list_artifacts(found.info.run_id, "pictures")] == [
        "pictures/memory.png"
    ]


def test_a_server_that_never_starts_delays_only_the_end(tmp_path: Path) -> None:
    run = load([], ["run.name=x", "data.shards=s", f"run.root={tmp_path}", "tracking.uri=http://127.0.0.1:9"])
    run.directory.mkdir()
    Journal(run.directory / "metrics.jsonl", 0).append(rows(1, 3))
    mirror = Mirror(run, run.directory).start()
    assert not mirror.finish("FINISHED", timeout_s=1)
    assert "run_id" not in json.loads((RunPaths(run.directory).mlflow).read_text())


def only(server: Server, config: RunConfig):  # type: ignore[no-untyped-def]
    """The one run of an experiment."""
    (found,) = runs_of(server.uri, config.tracking.experiment)
    return found


def wait(done, timeout_s: float = 60) -> None:  # type: ignore[no-untyped-def]
    """Wait until `done` returns true."""
    deadline = time.monotonic() + timeout_s
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.05)
