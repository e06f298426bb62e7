"""Sends what a run directory holds to MLflow: one pass at a time, under a lock, and nothing twice.

The mirror of a training and `megabase sync` both send with this, from different machines at the same time if need be.
The lock keeps them from creating two runs. On a file system without locks the points are still stored once, because
both give a point the same time.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megabase.datamodules.files import FileLock
from megabase.pipeline.config.schema import RunConfig
from megabase.pipeline.rundir.paths import RunPaths
from megabase.pipeline.tracking import about
from megabase.pipeline.tracking.artifacts import Files
from megabase.pipeline.tracking.identity import Identity, settle
from megabase.pipeline.tracking.model import TrainedModel
from megabase.pipeline.tracking.names import metric_name
from megabase.pipeline.tracking.points import Point, Points
from megabase.pipeline.tracking.server import Server
from megabase.pipeline.tracking.status import FINAL, RUNNING

# Most points that MLflow's REST interface takes in one call.
BATCH = 1000
RESTARTS_TAG = "megabase.restarts"
# The settings that MLflow shows with the trained model.
MODEL_SETTINGS = ("model.", "data.length", "data.shards")
# The metric that every step has.
STEPS = metric_name("loss")


class Sender:
    """Sends the journal, settings and files of a run directory to one MLflow run.

    Args:
        config: of the run; all settings become parameters of the MLflow run.
        directory: the run directory.
        server: to send to.

    Attributes:
        identity: `mlflow.json`.
        sent: points that were sent.
    """

    def __init__(self, config: RunConfig, directory: Path, server: Server) -> None:
        self.identity = Identity(directory, config.run.name)
        self.sent = 0
        self._config = config
        self._directory = directory
        self._server = server
        self._client: Any = None
        self._run_id: str | None = None
        self._is_open = False
        self._points = Points(directory)
        self._queue: list[Point] = []
        self._files = Files(directory)
        self._model = TrainedModel(directory, config.tracking.register, self.identity)

    def send(self, status: str | None = None, *, complete: bool = False) -> None:
        """Send what is new. After an error, the next call begins with a look at what MLflow has.

        Args:
            status: of the run from now on; None: as it is.
            complete: the journal gets no further rows.

        Raises:
            LockHeldError: another process is sending this run.
            Exception: of MLflow, SQLAlchemy, requests or sqlite.
        """
        self._queue += self._points.new(complete=complete)
        if self._is_open and status is None and not self._queue and not self._has_files():
            return
        with FileLock.take(RunPaths(self._directory).tracking_lock):
            try:
                self._send(status)
            except BaseException:
                self._is_open = False
                raise

    def _has_files(self) -> bool:
        return bool(self._files.changed()) or self._model.is_pending(self._run_id)

    def _send(self, status: str | None) -> None:
        self._client = self._client or self._server.client()
        if not self._is_open:
            self._open(complete_next=status in FINAL)
        self._send_queue()
        if status:
            if status in FINAL:
                self._client.set_terminated(self._run_id, status=status)
            about.log_settings(
                self._client, str(self._run_id), {}, {RESTARTS_TAG: str(self._points.restarts)}
            )
        self._files.send(self._client, str(self._run_id))
        settings = {
            key: value
            for key, value in about.settings_of(self._config).items()
            if key.startswith(MODEL_SETTINGS)
        }
        experiment_id = self.identity.read()["experiment_id"]
        self._model.send(self._client, experiment_id, str(self._run_id), settings, self._points.time_of)
        if status:
            # A request to create the run, slower than the client waits, may have been carried out in the meantime.
            known = self.identity.read()
            settle(self._client, known["experiment_id"], known["key"])
            self.identity.update(status=status)

    def _open(self, *, complete_next: bool) -> None:
        """Find or create the MLflow run, and look at what it has.

        Args:
            complete_next: the run's final status follows, so it is not set to RUNNING.
        """
        client, directory = self._client, self._directory
        step, start_ms = about.last_start(directory)
        tags = about.source_tags(directory)
        run_id = self.identity.open_run(client, self._server, start_ms, tags)
        if self._run_id not in (
            None,
            run_id,
        ):  # somebody deleted the MLflow run: send everything to the new one
            self._points, self._files = Points(directory), Files(directory)
            self._queue = self._points.new(complete=False)
        self._run_id = run_id
        run = client.get_run(run_id)
        # The last step of each metric is in the answer. A request for the history of a metric of a long run has
        # killed servers.
        last = {metric.key: int(metric.step) for metric in run.data.to_proto().metrics}
        self._points.skip(last)
        self._queue = [point for point in self._queue if point.step > last.get(point.name, -1)]
        if run.info.status != RUNNING and not complete_next:
            client.update_run(run_id, status=RUNNING)
        settings = about.settings_of(self._config)
        changed = about.changed_settings(settings, run.data.params, run.data.tags, step, last.get(STEPS, 0))
        new = {key: value for key, value in settings.items() if key not in run.data.params}
        other = {key: value for key, value in tags.items() if key != "mlflow.user"} | {
            RESTARTS_TAG: str(self._points.restarts)
        }
        missing = {key: value for key, value in other.items() if run.data.tags.get(key) != value}
        about.log_settings(client, run_id, new, changed | missing)
        about.log_datasets(client, run_id, directory)
        self._is_open = True

    def _send_queue(self) -> None:
        """Send the queue, the lowest step first. Points leave it once MLflow has them."""
        from mlflow.entities import Metric

        self._queue.sort(key=lambda point: point.step)
        while self._queue:
            part = self._queue[:BATCH]
            self._client.log_batch(
                self._run_id,
                metrics=[Metric(point.name, point.value, point.ms, point.step) for point in part],
            )
            self.sent += len(part)
            del self._queue[:BATCH]
