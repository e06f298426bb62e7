"""A thread that copies the journal of a run to MLflow.

Training writes the journal and never calls MLflow. This thread reads the journal and sends new rows. If the server is
slow or down, it tries again after growing pauses and delays nothing else; once the server answers, it sends all rows
that are missing. After a restart the same MLflow run is continued (its id is in `mlflow.json`). Rows of steps that
MLflow has already are not sent again, because a resumed run computes the same values. (A run that is resumed with
another `optim.*` computes other values: then the journal has the new ones and MLflow the old ones.)
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from megabase.datamodules.files import publish_json
from megabase.pipeline.config.keys import flatten
from megabase.pipeline.config.schema import RunConfig
from megabase.pipeline.files import read_object
from megabase.pipeline.rundir.journal import Row, Tail
from megabase.pipeline.rundir.paths import RunPaths

logger = logging.getLogger(__name__)

POLL_S = 1.0
LONGEST_PAUSE_S = 60.0
# Most metrics, and most parameters or tags, that MLflow's REST interface takes in one call.
BATCH = 1000
PARAM_BATCH = 100
# Longest value of a parameter, in characters.
PARAM_LENGTH = 500
# The tag of the MLflow run by which it is found again; the same key is in `mlflow.json`.
KEY_TAG = "megabase.key"


def default_uri(config: RunConfig) -> str:
    """`tracking.uri`, or an sqlite database in the run root."""
    return config.tracking.uri or f"sqlite:///{Path(config.run.root).absolute() / 'mlflow.db'}"


def is_complete(config: RunConfig) -> bool:
    """Whether MLflow has everything of a finished run, according to `mlflow.json`. MLflow is not asked."""
    about = {"uri": default_uri(config), "experiment": config.tracking.experiment, "status": "FINISHED"}
    database = Path(about["uri"].removeprefix("sqlite:///"))
    if about["uri"].startswith("sqlite:///") and not database.exists():
        return False
    return about.items() <= read_object(RunPaths(config.directory).mlflow).items()


class Mirror:
    """Sends `metrics.jsonl` and `performance.jsonl` of a run directory to one MLflow run. For rank 0.

    Args:
        config: of the run; all settings become parameters of the MLflow run.
        directory: the run directory.
    """

    def __init__(self, config: RunConfig, directory: Path) -> None:
        self._config = config
        self._directory = directory
        self._paths = RunPaths(directory)
        self._uri = default_uri(config)
        self._finish = threading.Event()
        self._status = "RUNNING"
        self._warned = False
        self._run_id: str | None = None
        # For each metric, the last step that MLflow has.
        self._sent: dict[str, int] = {}
        self._tails = [Tail(path) for path in (self._paths.metrics, self._paths.performance)]
        self._queue: list[tuple[str, float, int]] = []
        self._thread = threading.Thread(target=self._work, name="mlflow-mirror", daemon=True)

    def start(self) -> Mirror:
        """Start the thread."""
        self._thread.start()
        return self

    def finish(self, status: str, timeout_s: float) -> bool:
        """Send the rest and set the run's status (FINISHED, FAILED or KILLED).

        Returns:
            Whether everything was sent within `timeout_s`. The journal has the rest, and the next start of the run
            sends it.
        """
        self._status = status
        self._finish.set()
        if self._thread.ident is None:
            return True  # training ended before the journal was opened, so there is nothing to send
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _work(self) -> None:
        pause = POLL_S
        while True:
            finishing = self._finish.is_set()
            try:
                self._mirror_once(finishing)
                pause = POLL_S
                if finishing:
                    return
            except Exception as error:  # of MLflow, SQLAlchemy, requests or sqlite: none may end a training
                self._warn_once(error)
                pause = min(pause * 2, LONGEST_PAUSE_S)
            self._finish.wait(pause)
            if finishing:
                time.sleep(POLL_S)

    def _warn_once(self, error: Exception) -> None:
        if not self._warned:
            logger.warning(
                f"MLflow at {self._uri} does not take metrics ({type(error).__name__});"
                " training goes on, the journal keeps them (to train without MLflow: tracking.enabled=false)"
            )
            self._warned = True

    def _mirror_once(self, finishing: bool) -> None:
        """Send all new rows; when finishing, also the artifacts and the run's final status."""
        client = self._client()
        if self._run_id is None:
            self._run_id = self._open_run(client)
            self._sent = self._last_steps(client, self._run_id)
        for tail in self._tails:
            self._queue += [(name, value, row["step"]) for row in tail.new() for name, value in _metrics(row)]
        self._send(client)
        if finishing:
            paths = self._paths
            for artifact in (paths.loss_curve, paths.config, paths.environment, paths.init_from):
                if artifact.exists():
                    client.log_artifact(self._run_id, str(artifact))
            client.set_terminated(self._run_id, status=self._status)
            publish_json(self._paths.mlflow, {**self._known(), "status": self._status})

    def _client(self) -> Any:
        # Imported here because it takes seconds, and a run without tracking does not need it.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        logging.getLogger("alembic").setLevel(logging.ERROR)
        logging.getLogger("mlflow").setLevel(logging.ERROR)
        from mlflow.tracking import MlflowClient

        return MlflowClient(tracking_uri=self._uri)

    def _open_run(self, client: Any) -> str:
        """Find or create the MLflow run and set it to RUNNING; returns its id.

        The process may be killed at any moment here. So a key is written to `mlflow.json` before MLflow gets it as a
        tag: a run that was just created is found again by that tag, even if its id has not been written yet.
        """
        known = self._known()
        experiment_id = self._experiment(client)
        found = client.search_runs([experiment_id], f"tags.`{KEY_TAG}` = '{known['key']}'", max_results=1)
        if found:
            run = found[0]
        else:
            tags = {KEY_TAG: known["key"], "megabase.run_directory": str(self._directory)}
            run = client.create_run(experiment_id, run_name=self._config.run.name, tags=tags)
        run_id = str(run.info.run_id)
        publish_json(self._paths.mlflow, {**known, "run_id": run_id, "status": "RUNNING"})
        client.update_run(run_id, status="RUNNING")
        self._log_params(client, run_id, client.get_run(run_id).data.params)
        return run_id

    def _known(self) -> dict[str, Any]:
        """The content of `mlflow.json` if it names this server and experiment; else a new content, which is saved."""
        about = {"uri": self._uri, "experiment": self._config.tracking.experiment}
        try:
            known: dict[str, Any] = json.loads(self._paths.mlflow.read_text())
            if about.items() <= known.items():
                return known
        except (FileNotFoundError, json.JSONDecodeError):
            pass
        known = {**about, "key": uuid.uuid4().hex, "run_id": None}
        publish_json(self._paths.mlflow, known)
        return known

    def _experiment(self, client: Any) -> str:
        """Id of the experiment `tracking.experiment`, which is created if it does not exist."""
        name = self._config.tracking.experiment
        experiment = client.get_experiment_by_name(name)
        if experiment is not None:
            return str(experiment.experiment_id)
        location = None
        if self._uri.startswith("sqlite:"):
            location = (Path(self._config.run.root).absolute() / "mlartifacts").as_uri()
        return str(client.create_experiment(name, artifact_location=location))

    def _log_params(self, client: Any, run_id: str, known: dict[str, str]) -> None:
        """Send the settings as parameters. MLflow's parameters are immutable, so a changed setting becomes a tag.

        Args:
            client: of MLflow.
            run_id: of the MLflow run.
            known: its parameters.
        """
        from mlflow.entities import Param, RunTag

        tree = dataclasses.asdict(self._config)
        # The keys of the mixture are patterns, which MLflow does not accept as names of parameters.
        tree["data"]["mixture"] = json.dumps(tree["data"]["mixture"])
        settings = {key: str(value)[:PARAM_LENGTH] for key, value in flatten(tree).items()}
        new = [Param(key, value) for key, value in settings.items() if key not in known]
        changed = [
            RunTag(f"changed.{key}", value)
            for key, value in settings.items()
            if known.get(key, value) != value
        ]
        for first in range(0, len(new), PARAM_BATCH):
            client.log_batch(run_id, params=new[first : first + PARAM_BATCH])
        for first in range(0, len(changed), PARAM_BATCH):
            client.log_batch(run_id, tags=changed[first : first + PARAM_BATCH])

    def _last_steps(self, client: Any, run_id: str) -> dict[str, int]:
        """The last step of each metric that the MLflow run has."""
        names = client.get_run(run_id).data.metrics
        return {
            name: max((point.step for point in client.get_metric_history(run_id, name)), default=-1)
            for name in names
        }

    def _send(self, client: Any) -> None:
        """Send the queue, the oldest step first. A sent entry leaves it, so an error loses and repeats none."""
        from mlflow.entities import Metric

        self._queue = [entry for entry in self._queue if entry[2] > self._sent.get(entry[0], -1)]
        self._queue.sort(key=lambda entry: entry[2])
        now = int(time.time() * 1000)
        while self._queue:
            part = self._queue[:BATCH]
            client.log_batch(
                self._run_id, metrics=[Metric(name, value, now, step) for name, value, step in part]
            )
            for name, _, step in part:
                self._sent[name] = max(self._sent.get(name, -1), step)
            del self._queue[:BATCH]


def _metrics(row: Row) -> list[tuple[str, float]]:
    """(name, value) of each metric in a row of a journal. Steps, times and hashes of samples are not metrics."""
    return [
        (name, float(value))
        for name, value in row.items()
        if name not in ("step", "samples", "time", "started") and isinstance(value, int | float)
    ]
