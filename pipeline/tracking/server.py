"""Which MLflow server and experiment a run is sent to, and the client that talks to it.

The settings `tracking.uri` and `tracking.experiment` win over MLflow's own environment variables, and those win over
the defaults. MLflow's client reads credentials from the environment (MLFLOW_TRACKING_USERNAME and its relatives), so
they are in no file of a run.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megabase.pipeline.config.uris import refuse_credentials

if TYPE_CHECKING:
    from megabase.pipeline.config.schema import RunConfig

URI_VARIABLE = "MLFLOW_TRACKING_URI"
EXPERIMENT_VARIABLE = "MLFLOW_EXPERIMENT_NAME"
DEFAULT_EXPERIMENT = "megabase"
SQLITE = "sqlite:///"
# Seconds that the client waits for an answer, if MLFLOW_HTTP_REQUEST_TIMEOUT is not set.
TIMEOUT_S = 20
# The tag by which MLflow's page shows an experiment as one of model training.
EXPERIMENT_KIND = ("mlflow.experimentKind", "custom_model_development")


def quiet_mlflow() -> None:
    """Keep MLflow's messages off our output, and its reports of use off the network. For before it is imported."""
    # Standard output is for results, of `megabase job-end` for example.
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    logging.getLogger("alembic").setLevel(logging.ERROR)
    logging.getLogger("mlflow").setLevel(logging.ERROR)


@dataclass(frozen=True)
class Server:
    """An MLflow server and an experiment on it.

    Attributes:
        uri: of the tracking server or database.
        experiment: its name.
        artifacts: where a new experiment keeps its artifacts; None: where the server decides.
    """

    uri: str
    experiment: str
    artifacts: str | None = None

    @classmethod
    def of(cls, config: RunConfig, known: Mapping[str, Any] | None = None) -> Server:
        """The server of a run: from `tracking.*`, else from MLflow's variables, else a database in the run root.

        Args:
            config: of the run.
            known: `mlflow.json`: where the run was sent before, which counts more than the default.

        Raises:
            UserError: the URI holds a password.
        """
        root = Path(config.run.root).absolute()
        known = known or {}
        uri = (
            config.tracking.uri
            or os.environ.get(URI_VARIABLE)
            or known.get("uri")
            or f"{SQLITE}{root / 'mlflow.db'}"
        )
        refuse_credentials("tracking.uri" if config.tracking.uri else URI_VARIABLE, uri)
        experiment = (
            config.tracking.experiment
            or os.environ.get(EXPERIMENT_VARIABLE)
            or known.get("experiment")
            or DEFAULT_EXPERIMENT
        )
        return cls(uri, experiment, (root / "mlartifacts").as_uri() if uri.startswith("sqlite:") else None)

    def has_database(self) -> bool:
        """False if the URI names an sqlite database that does not exist."""
        return not self.uri.startswith(SQLITE) or Path(self.uri.removeprefix(SQLITE)).exists()

    def client(self) -> Any:
        """An `MlflowClient`. Imports MLflow, which takes seconds."""
        quiet_mlflow()
        # MLflow's client would repeat a POST whose answer was lost, and so create a second run. The mirror repeats
        # requests itself, after it has looked at what the server has.
        os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(TIMEOUT_S))
        from mlflow.tracking import MlflowClient

        return MlflowClient(tracking_uri=self.uri)

    def experiment_id(self, client: Any) -> str:
        """Id of the experiment, which is created if it does not exist.

        Its kind is set, if it has none: without it MLflow's page shows the experiment as one of GenAI apps.
        """
        found = client.get_experiment_by_name(self.experiment)
        if found is None:
            try:
                tags = dict([EXPERIMENT_KIND])
                return str(client.create_experiment(self.experiment, self.artifacts, tags=tags))
            except Exception:
                # Another job may have created it in the meantime, or the answer was lost.
                found = client.get_experiment_by_name(self.experiment)
                if found is None:
                    raise
        if EXPERIMENT_KIND[0] not in found.tags:
            client.set_experiment_tag(found.experiment_id, *EXPERIMENT_KIND)
        return str(found.experiment_id)
