"""What MLflow is told about a run beside its points and files: parameters, tags and datasets."""

from __future__ import annotations

import dataclasses
import getpass
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from megabase.pipeline.config.keys import flatten
from megabase.pipeline.config.schema import RunConfig
from megabase.pipeline.files import read_object
from megabase.pipeline.rundir.journal import read
from megabase.pipeline.rundir.paths import RunPaths

# Most parameters or tags that MLflow's REST interface takes in one call.
PARAM_BATCH = 100
# Longest value of a parameter, in characters.
PARAM_LENGTH = 500
# The same of a tag.
TAG_LENGTH = 5000
# A setting with which a run was resumed, if it differs from the parameter: MLflow's parameters are immutable.
CHANGED = "changed."
# Where a run is stored and sent may differ from machine to machine, and changes nothing in it.
_PLACES = ("run.root", "tracking.")


def source_tags(directory: Path) -> dict[str, str]:
    """The tags from which MLflow's page fills Source, Version and User, and the run directory."""
    environment = read_object(RunPaths(directory).environment)
    tags = {"megabase.run_directory": str(directory)}
    with suppress(KeyError, OSError, ImportError):  # a container's user may have no name
        tags["mlflow.user"] = getpass.getuser()
    command = [str(word) for word in environment.get("command") or []]
    if command:
        program = Path(command[0]).name
        if program == "cli.py":  # `python -m megabase.pipeline.cli`, as jobs call it
            program = "megabase"
        tags["megabase.command"] = " ".join([program, *command[1:]])[:TAG_LENGTH]
        # Without arguments: of a source, MLflow's page shows what follows the last slash.
        tags["mlflow.source.name"] = " ".join([program, *command[1:2]])
        tags["mlflow.source.type"] = "JOB" if environment.get("slurm") else "LOCAL"
    if commit := environment.get("commit"):
        tags["mlflow.source.git.commit"] = str(commit).removesuffix("-dirty")
        tags["mlflow.source.git.dirty"] = str(str(commit).endswith("-dirty")).lower()
    return tags


def settings_of(config: RunConfig) -> dict[str, str]:
    """All settings as MLflow's parameters."""
    tree = dataclasses.asdict(config)
    # The keys of the mixture are patterns, which MLflow does not accept as names of parameters.
    tree["data"]["mixture"] = json.dumps(tree["data"]["mixture"])
    return {key: str(value)[:PARAM_LENGTH] for key, value in flatten(tree).items()}


def changed_settings(
    settings: dict[str, str], params: dict[str, str], tags: dict[str, str], step: int, sent: int
) -> dict[str, str]:
    """The tags that say that a run was resumed with other settings.

    Steps that are trained again keep the points of their first pass, because MLflow cannot replace points.

    Args:
        settings: of this start.
        params, tags: that the MLflow run has.
        step: that the run was resumed from.
        sent: the last step that MLflow has.
    """
    before = {key: tags.get(f"{CHANGED}{key}", value) for key, value in params.items()}
    different = {
        key: value
        for key, value in settings.items()
        if before.get(key, value) != value and not key.startswith(_PLACES)
    }
    if not different:
        return {}
    text = ", ".join(f"{key} {before[key]} -> {value}" for key, value in different.items())
    if sent > step:
        text += f"; the points of steps {step + 1} to {sent} are those of the settings before"
    return {f"{CHANGED}{key}": value for key, value in different.items()} | {f"resumed.{step}": text}


def last_start(directory: Path) -> tuple[int, int | None]:
    """The step of the last start of a run, and the time of its first, in milliseconds since 1970."""
    starts = [row for row in read(RunPaths(directory).performance, having='"started"') if "time" in row]
    if not starts:
        return 0, None
    return int(starts[-1]["step"]), round(starts[0]["time"] * 1000)


def log_settings(client: Any, run_id: str, params: dict[str, str], tags: dict[str, str]) -> None:
    """Send parameters and tags, as many in one request as MLflow takes."""
    from mlflow.entities import Param, RunTag

    new = [Param(key, value) for key, value in params.items()]
    for first in range(0, len(new), PARAM_BATCH):
        client.log_batch(run_id, params=new[first : first + PARAM_BATCH])
    other = [RunTag(key, value) for key, value in tags.items()]
    for first in range(0, len(other), PARAM_BATCH):
        client.log_batch(run_id, tags=other[first : first + PARAM_BATCH])


def dataset_name(shards: str, split: str) -> str:
    """The name in MLflow of a split of the shards."""
    return f"{Path(shards.rstrip('/')).name}/{split}"


def log_datasets(client: Any, run_id: str, directory: Path) -> None:
    """Send each split of the shards as a dataset. MLflow stores one once, however often it is sent."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    about = read_object(RunPaths(directory).dataset)
    if not about:
        return
    shards = str(about["shards"])
    inputs = [
        DatasetInput(
            Dataset(
                name=dataset_name(shards, split),
                digest=str(about["identity"]),
                source_type="http" if "://" in shards else "local",
                source=json.dumps({"uri": shards}),
                profile=json.dumps({"alphabet": about["alphabet"], **profile}),
            ),
            [InputTag("mlflow.data.context", split)],
        )
        for split, profile in about["splits"].items()
    ]
    client.log_inputs(run_id, inputs)
