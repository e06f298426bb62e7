"""Journals of a run for tests, and what MLflow has of it."""

from typing import Any

from mlflow.entities import Run
from mlflow.tracking import MlflowClient

from megabase.pipeline.config.schema import RunConfig
from megabase.pipeline.rundir.journal import Journal, Row
from megabase.pipeline.rundir.paths import RunPaths

START = 1_700_000_000.0


def time_of(step: int, again: float = 0.0) -> float:
    """When a step was done, in seconds; `again`: seconds later, in another pass."""
    return START + step / 4 + again


def write(config: RunConfig, first: int, last: int, *, again: float = 0.0, **more: Any) -> None:
    """Append the rows that a start of a run writes which does the steps from `first` to `last`.

    A start after the first drops the rows from `first` on, as training does.
    """
    paths = RunPaths(config.directory)
    metrics, performance = Journal(paths.metrics, first - 1), Journal(paths.performance, 10**9)
    performance.append([{"step": first - 1, "time": time_of(first - 1, again), "started": True}])
    steps = range(first, last + 1)
    metrics.append([{"step": step, "loss": 2.0 / step, "samples": "00", **more} for step in steps])
    times = [time_of(step, again) for step in steps]
    performance.append([{"step": last, "time": times[-1], "step_times": times, "tokens_per_second": 5.0}])


def rows(first: int, last: int) -> list[Row]:
    """Rows of the journal."""
    return [{"step": step, "loss": 2.0 / step, "samples": "00"} for step in range(first, last + 1)]


def runs_of(uri: str, experiment: str | None) -> list[Run]:
    """All runs of an experiment, the deleted ones left out."""
    client = MlflowClient(uri)
    found = client.get_experiment_by_name(experiment or "megabase")
    return [] if found is None else list(client.search_runs([found.experiment_id]))


def history(uri: str, run_id: str, metric: str = "train/loss") -> list[tuple[int, float, int]]:
    """(step, value, time in milliseconds) of all points of a metric, in the order of steps."""
    points = MlflowClient(uri).get_metric_history(run_id, metric)
    return sorted((point.step, point.value, point.timestamp) for point in points)


def expected(first: int, last: int) -> list[tuple[int, float, int]]:
    """What `history` returns if everything arrived once, with the time of its step."""
    return [(step, 2.0 / step, round(time_of(step) * 1000)) for step in range(first, last + 1)]
