"""What MLflow is told about a run beside its points."""

import json
from pathlib import Path

import pytest

from megabase.pipeline.config.load import load
from megabase.pipeline.rundir.paths import RunPaths
from megabase.pipeline.tracking.about import changed_settings, settings_of, source_tags


def test_changed_settings_are_named_with_the_steps_that_keep_older_points() -> None:
    params = {"optim.lr": "0.1", "zero.stage": "1"}
    assert changed_settings({"optim.lr": "0.1", "new": "1"}, params, {}, 30, 40) == {}
    first = changed_settings({"optim.lr": "0.2", "zero.stage": "1"}, params, {}, 30, 40)
    assert first == {
        "changed.optim.lr": "0.2",
        "resumed.30": "optim.lr 0.1 -> 0.2; the points of steps 31 to 40 are those of the settings before",
    }
    assert changed_settings({"optim.lr": "0.2", "zero.stage": "1"}, params, first, 30, 40) == {}
    # A machine that sends the run from elsewhere.
    places = {"run.root": "/x", "tracking.uri": "http://x"}
    assert changed_settings(places, params | {"run.root": "runs", "tracking.uri": "None"}, {}, 30, 40) == {}
    # Back to the value at the start.
    again = changed_settings({"optim.lr": "0.1", "zero.stage": "1"}, params, first, 50, 50)
    assert again == {"changed.optim.lr": "0.1", "resumed.50": "optim.lr 0.2 -> 0.1"}


def test_settings_become_parameters_that_mlflow_accepts() -> None:
    config = load([], ["run.name=x", "data.shards=" + "s" * 1000])
    config.data.mixture = {"gi|1|*": 2.0}
    settings = settings_of(config)
    assert len(settings["data.shards"]) == 500 and json.loads(settings["data.mixture"]) == {"gi|1|*": 2.0}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, {}),
        (
            {
                "command": ["/x/pipeline/cli.py", "train", "a/b.yaml"],
                "commit": "abc-dirty",
                "slurm": {"SLURM_JOB_ID": "1"},
            },
            {
                "megabase.command": "megabase train a/b.yaml",
                "mlflow.source.name": "megabase train",
                "mlflow.source.type": "JOB",
                "mlflow.source.git.commit": "abc",
                "mlflow.source.git.dirty": "true",
            },
        ),
        (
            {"command": ["m"], "commit": None},
            {"megabase.command": "m", "mlflow.source.name": "m", "mlflow.source.type": "LOCAL"},
        ),
    ],
)
def test_source(tmp_path: Path, environment: dict[str, object], expected: dict[str, str]) -> None:
    RunPaths(tmp_path).environment.write_text(json.dumps(environment))
    found = source_tags(tmp_path)
    found.pop("mlflow.user", None)
    assert found == {"megabase.run_directory": str(tmp_path), **expected}
