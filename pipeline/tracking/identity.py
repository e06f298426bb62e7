"""One run directory is one MLflow run: how it is found, and created once.

`mlflow.json` in the run directory holds a key, made at the first start. The MLflow run carries it as a tag and is found
by it, also from a copy of the run directory. MLflow does not let a client choose the id of a run, so a request to
create one whose answer is lost may leave a run behind: the key is searched for before each attempt, and of several runs
with the key one is taken and the others, which are empty, are deleted.
"""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

from megabase.datamodules.files import publish_json
from megabase.pipeline.files import read_object
from megabase.pipeline.rundir.paths import RunPaths
from megabase.pipeline.tracking.server import Server

# The tag of the MLflow run by which it is found again; the same key is in `mlflow.json`.
KEY_TAG = "megabase.key"


class Identity:
    """`mlflow.json` of a run directory.

    Args:
        directory: the run directory.
        name: of the run. A copy of the directory under another name is another run.
    """

    def __init__(self, directory: Path, name: str) -> None:
        self._path = RunPaths(directory).mlflow
        self._name = name

    def read(self) -> dict[str, Any]:
        """The content; a new key if there is none, or if it is that of another run."""
        known = read_object(self._path)
        if known.get("key") and known.get("name", self._name) == self._name:
            return known
        return {"name": self._name, "key": uuid.uuid4().hex}

    def update(self, **values: Any) -> dict[str, Any]:
        """Write these values to the file, which keeps its others; returns the content. Raises OSError."""
        known = self.read()
        changed = {**known, "name": self._name, **values}
        if changed != known or not self._path.exists():
            publish_json(self._path, changed)
        return changed

    def open_run(self, client: Any, server: Server, start_ms: int | None, tags: dict[str, str]) -> str:
        """Find or create the MLflow run; returns its id, which is written to the file.

        Args:
            client: of MLflow.
            server: that the client talks to.
            start_ms: start of the run, in milliseconds since 1970; None: now.
            tags: of a new run.
        """
        # Written before MLflow gets the key: if this process is killed now, the next one searches for the same key.
        key = self.update(uri=server.uri, experiment=server.experiment)["key"]
        experiment_id = server.experiment_id(client)
        run_id = settle(client, experiment_id, key)
        if run_id is None:
            made = client.create_run(
                experiment_id, start_time=start_ms, run_name=self._name, tags={KEY_TAG: key, **tags}
            )
            run_id = str(made.info.run_id)
        self.update(run_id=run_id, experiment_id=experiment_id)
        return run_id


def settle(client: Any, experiment_id: str, key: str) -> str | None:
    """The id of the one run with this key, after deleting empty others; None if there is no run.

    Args:
        client: of MLflow.
        experiment_id: where to search.
        key: the value of the tag.
    """
    found = client.search_runs([experiment_id], f"tags.`{KEY_TAG}` = '{key}'")
    if not found:
        return None
    # The run that has received something; else all of them are empty, and any process takes the same one.
    first, *others = sorted(found, key=lambda run: (not run.data.params, run.info.run_id))
    for run in others:
        if not run.data.params and not run.data.metrics:
            client.delete_run(run.info.run_id)
    return str(first.info.run_id)
