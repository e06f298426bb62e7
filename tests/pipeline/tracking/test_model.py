"""The trained model of a run reaches a real server once, and is registered once."""

import json
from pathlib import Path
from typing import Any

import pytest
from mlflow.models import Model
from mlflow.tracking import MlflowClient

from megabase.pipeline import cli
from megabase.pipeline.config.load import save
from megabase.pipeline.config.schema import RunConfig
from megabase.pipeline.errors import UserError
from megabase.pipeline.rundir.paths import RunPaths
from megabase.pipeline.rundir.status import write_status
from megabase.pipeline.tracking.mirror import Mirror
from tests.pipeline.tracking.conftest import make_run
from tests.pipeline.tracking.runs import history, write
from tests.pipeline.tracking.servers import LOSE, PASS, Proxy, Server
from tests.pipeline.tracking.test_mirror import only


def write_trained(run: RunConfig, step: int, checksum: str) -> None:
    """What `inference.mlflow_model` writes, with other content."""
    directory = RunPaths(run.directory).model
    export = directory / "data" / "export"
    export.mkdir(parents=True, exist_ok=True)
    (export / "config.json").write_text(json.dumps({"step": step, "manifest_sha256": checksum}))
    (export / "model.safetensors").write_bytes(b"weights" * step)
    Model().save(str(directory / "MLmodel"))


def models_of(server: Server, run: RunConfig) -> list[Any]:
    """The models of an experiment, the oldest first."""
    client = MlflowClient(server.uri)
    experiment = client.get_experiment_by_name(run.tracking.experiment)
    found = client.search_logged_models([experiment.experiment_id])
    return sorted(found, key=lambda model: model.creation_timestamp)


@pytest.mark.slow
@pytest.mark.xdist_group("mlflow")
def test_a_model_is_sent_and_registered_once_whatever_answers_are_lost(
    run: RunConfig, proxy: Proxy, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"genome {run.tracking.experiment}"
    run.tracking.register = name
    save(run, RunPaths(run.directory).config)
    dataset = {"shards": "data/lambda", "identity": "00ff", "alphabet": "dna", "splits": {"valid": {}}}
    RunPaths(run.directory).dataset.write_text(json.dumps(dataset))
    write(run, 1, 5, valid_loss=1.0)
    write_trained(run, 5, "aa")
    lost = {"logged-models", "registered-models/create", "model-versions/create", "runs/outputs"}
    seen: set[str] = set()

    def lose_once(path: str) -> str:
        first = path in lost and path not in seen
        seen.add(path)
        return LOSE if first else PASS

    proxy.behave = lose_once
    assert Mirror(run, run.directory).start().finish("FINISHED", timeout_s=90)
    assert lost <= seen
    found = only(server, run)
    client = MlflowClient(server.uri)
    (model,) = models_of(server, run)
    assert model.status == "READY" and model.source_run_id == found.info.run_id
    assert model.params["model.dim"] == str(run.model.dim) and model.tags["megabase.step"] == "5"
    assert [(metric.key, metric.dataset_name) for metric in model.metrics] == [
        ("valid/loss", "lambda/valid"),
        ("valid/perplexity", "lambda/valid"),
    ]
    assert len(history(server.uri, found.info.run_id, "valid/loss")) == 5
    assert [output.model_id for output in found.outputs.model_outputs] == [model.model_id]
    (version,) = client.search_model_versions(f"name = '{name}'")
    assert version.source == model.artifact_location and version.run_id == found.info.run_id
    assert Model.load(str(RunPaths(run.directory).model / "MLmodel")).model_id == model.model_id

    # Nothing is sent again by another start, nor by sync.
    proxy.paths.clear()
    write_status(run.directory, "finished", 5)
    assert Mirror(run, run.directory).start().finish("FINISHED", timeout_s=60)
    assert not [path for path in proxy.paths if "model" in path]

    # The run was continued: its new model is another one, and the next version.
    write_trained(run, 9, "bb")
    assert Mirror(run, run.directory).start().finish("FINISHED", timeout_s=60)
    assert [each.tags["megabase.step"] for each in models_of(server, run)] == ["5", "9"]
    assert len(client.search_model_versions(f"name = '{name}'")) == 2


@pytest.mark.slow
def test_a_database_gets_the_model_as_well(tmp_path: Path) -> None:
    run = make_run(tmp_path, f"sqlite:///{tmp_path}/mlflow.db", "e")
    run.tracking.register = "genome"
    write(run, 1, 5)
    write_trained(run, 5, "aa")
    assert Mirror(run, run.directory).start().finish("FINISHED", timeout_s=90)
    (version,) = MlflowClient(run.tracking.uri).search_model_versions("name = 'genome'")
    assert version.source.startswith((tmp_path / "mlartifacts").as_uri())


@pytest.mark.parametrize("name", ["", " ", "a/b", "a:b"])
def test_names_that_mlflow_does_not_take_are_refused(run: RunConfig, name: str) -> None:
    run.tracking.register = name
    with pytest.raises(UserError, match=r"tracking\.register="):
        run.tracking.validate()


@pytest.mark.slow
@pytest.mark.xdist_group("mlflow")
def test_sync_makes_no_model_of_a_run_that_trains(run: RunConfig, capfd: pytest.CaptureFixture[str]) -> None:
    write(run, 1, 5)
    write_status(run.directory, "running", 0)
    assert cli.main(["sync", str(run.directory), "tracking.log_model=true"]) == 0
    assert "is not finished, so MLflow does not get its model yet" in capfd.readouterr().err
    assert not RunPaths(run.directory).model.exists()
