"""Sends the trained model in a run directory to MLflow: each checkpoint's model once, however often it is tried."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from megabase.datamodules.index.segments import VALID
from megabase.pipeline.files import read_object
from megabase.pipeline.rundir.journal import read
from megabase.pipeline.rundir.paths import RunPaths
from megabase.pipeline.tracking.about import dataset_name, source_tags
from megabase.pipeline.tracking.identity import KEY_TAG, Identity
from megabase.pipeline.tracking.names import metrics_of

# The name of a run's model in MLflow.
NAME = "model"
# The export in the directory of an MLflow model, where MLflow keeps a model's data.
EXPORT = Path("data") / "export"
# The tag of an MLflow model with the checksum of the manifest of its checkpoint.
CHECKSUM_TAG = "megabase.manifest_sha256"
STEP_TAG = "megabase.step"


class TrainedModel:
    """The model of a run, sent and registered.

    Args:
        directory: the run directory.
        register: name of the registered model that gets it as a version; None: none.
        identity: `mlflow.json`, which keeps what was sent.
    """

    def __init__(self, directory: Path, register: str | None, identity: Identity) -> None:
        self._run = directory
        self._directory = RunPaths(directory).model
        self._register = register
        self._identity = identity
        self._sent: tuple[int, str] | None = None

    def is_pending(self, run_id: str | None) -> bool:
        """Whether there is a model that MLflow lacks, according to `mlflow.json`.

        Args:
            run_id: of the MLflow run.
        """
        config = self._directory / EXPORT / "config.json"
        if not config.exists():
            return False
        now = config.stat().st_mtime_ns, str(run_id)
        if self._sent != now:
            known = self._identity.read().get("model") or {}
            wanted = {
                "run_id": run_id,
                CHECKSUM_TAG: self._about().get("manifest_sha256"),
                "registered": self._register,
            }
            if not wanted.items() <= known.items():
                return True
            self._sent = now
        return False

    def send(
        self,
        client: Any,
        experiment_id: str,
        run_id: str,
        params: dict[str, str],
        time_of: Callable[[int], int | None],
    ) -> None:
        """Send and register the model, unless that was done.

        Args:
            client: of MLflow.
            experiment_id: of the run.
            run_id: of the MLflow run.
            params: that MLflow shows with the model.
            time_of: when a step was done, in milliseconds since 1970.
        """
        if not self.is_pending(run_id):
            return
        about = self._about()
        tags = {
            KEY_TAG: self._identity.read()["key"],
            CHECKSUM_TAG: str(about["manifest_sha256"]),
            STEP_TAG: str(about["step"]),
        }
        source = source_tags(self._run)
        tags |= {key: source[key] for key in ("mlflow.user", "mlflow.source.name") if key in source}
        model = find_or_create(client, experiment_id, run_id, tags, params)
        if not is_ready(model):
            self._log_evaluation(client, run_id, model.model_id, int(about["step"]), time_of)
            _link(client, run_id, model.model_id, int(about["step"]))
            self._write_ids(run_id, model.model_id)
            client.log_model_artifacts(model.model_id, str(self._directory))
            client.finalize_logged_model(model.model_id, "READY")
        if self._register:
            register(client, self._register, run_id, model)
        sent = {"run_id": run_id, CHECKSUM_TAG: tags[CHECKSUM_TAG], "registered": self._register}
        self._identity.update(model={"id": model.model_id, **sent})

    def _about(self) -> dict[str, Any]:
        return read_object(self._directory / EXPORT / "config.json")

    def _log_evaluation(
        self, client: Any, run_id: str, model_id: str, step: int, time_of: Callable[[int], int | None]
    ) -> None:
        """Show the evaluation of the model's step with the model: the same points as those of the run."""
        from mlflow.entities import Metric

        paths = RunPaths(self._run)
        data, ms = read_object(paths.dataset), time_of(step)
        rows = [row for row in read(paths.metrics, having="valid_loss") if row["step"] == step]
        if not rows or not data or ms is None:
            return
        of = {
            "model_id": model_id,
            "run_id": run_id,
            "dataset_name": dataset_name(str(data["shards"]), VALID),
            "dataset_digest": str(data["identity"]),
        }
        values = [
            pair
            for name, value in rows[-1].items()
            if name.startswith(("valid_", "full_valid_")) and isinstance(value, int | float)
            for pair in metrics_of(name, float(value))
        ]
        client.log_batch(run_id, metrics=[Metric(name, value, ms, step, **of) for name, value in values])

    def _write_ids(self, run_id: str, model_id: str) -> None:
        """Write into the model's description which run and model of MLflow it is, as MLflow itself does."""
        from mlflow.models import Model

        path = self._directory / "MLmodel"
        model = Model.load(str(path))
        model.run_id, model.model_id = run_id, model_id
        model.save(str(path))


def find_or_create(
    client: Any, experiment_id: str, run_id: str, tags: dict[str, str], params: dict[str, str]
) -> Any:
    """The MLflow model with these tags, after deleting further ones that lost answers have left behind."""
    wanted = " AND ".join(f"tags.`{key}` = '{tags[key]}'" for key in (KEY_TAG, CHECKSUM_TAG))
    found = client.search_logged_models([experiment_id], filter_string=wanted)
    if not found:
        return client.create_logged_model(
            experiment_id, name=NAME, source_run_id=run_id, tags=tags, params=params
        )
    first, *others = sorted(found, key=lambda model: (not is_ready(model), model.model_id))
    for model in others:
        client.delete_logged_model(model.model_id)
    return first


def is_ready(model: Any) -> bool:
    """Whether an MLflow model has its files."""
    return str(getattr(model.status, "value", model.status)) == "READY"


def register(client: Any, name: str, run_id: str, model: Any) -> None:
    """Make an MLflow model a version of a registered model, unless it is one."""
    from mlflow.exceptions import MlflowException

    # Not `models:/ID`, which a database resolves in the tracking server of the environment, not in itself.
    source = model.artifact_location
    versions = client.search_model_versions(f"run_id = '{run_id}'")
    if any(version.name == name and version.source == source for version in versions):
        return
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    client.create_model_version(name, source, run_id, model_id=model.model_id, await_creation_for=0)


def _link(client: Any, run_id: str, model_id: str, step: int) -> None:
    """Make the model an output of its run."""
    from mlflow.entities import LoggedModelOutput

    outputs = client.get_run(run_id).outputs
    if model_id not in {output.model_id for output in (outputs.model_outputs if outputs else [])}:
        client.log_outputs(run_id, [LoggedModelOutput(model_id, step)])
