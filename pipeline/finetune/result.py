"""What a fine-tuning reached on its test split, beside its baseline: `result.json`, `predictions.parquet`, a table."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import parquet
from rich.table import Table

from megabase.datamodules.files import publish_json
from megabase.datamodules.index.segments import TEST
from megabase.pipeline.config.schema import RunConfig
from megabase.pipeline.finetune.baseline import base_baseline, kmer_baseline
from megabase.pipeline.finetune.examples import SPLITS, Examples, Problem
from megabase.pipeline.finetune.metrics import MOST_BASES, Estimate, estimates
from megabase.pipeline.finetune.predict import Loaded, best_or_none, load_finetuned
from megabase.pipeline.finetune.task import Work
from megabase.pipeline.rundir.paths import RunPaths
from megabase.pipeline.tables import new_table

PREDICTIONS = "predictions.parquet"


def write_result(config: RunConfig, work: Work) -> dict[str, Any]:
    """Predict the test split with the checkpoint of the lowest validation loss; write and return the result.

    Raises:
        UserError, RunError: the checkpoint cannot be read.
        OSError: a file cannot be written.
    """
    examples, directory = work.examples, config.directory
    loaded = load_finetuned(directory)
    chosen = examples.of(TEST)
    found = loaded.predict(examples, chosen)
    write_predictions(directory / PREDICTIONS, loaded, examples, chosen, found, labels=True)
    judged = _judged(examples, chosen, found)
    per_base = examples.problem.per_base
    baseline = (base_baseline if per_base else kmer_baseline)(examples, loaded.alphabet)
    result = {
        "run": str(directory),
        "step": loaded.step,
        "seed": config.run.seed,
        **work.record,
        "task": examples.problem.name,
        "splits": {split: examples.splits.count(split) for split in SPLITS},
        "metrics": _as_dict(judged.estimates(judged.found)),
        "baseline": {
            "name": baseline.name,
            "metrics": _as_dict(judged.estimates(baseline.found[judged.spread])),
        },
    }
    publish_json(RunPaths(directory).result, result, indent=1)
    return result


@dataclass(frozen=True, eq=False)
class _Judged:
    """What the metrics are computed of: labels and predictions, of single bases one behind the other.

    Attributes:
        problem: what was predicted.
        labels, found: (n,) and (n, outputs).
        windows: (n,) of single bases; None: of whole sequences.
        spread: which of all labels these are.
    """

    problem: Problem
    labels: NDArray[np.float64]
    found: NDArray[np.float64]
    windows: NDArray[np.int64] | None
    spread: NDArray[np.int64]

    def estimates(self, found: NDArray[np.float64]) -> dict[str, Estimate]:
        return estimates(self.problem, self.labels, found, self.windows)


def _judged(examples: Examples, chosen: NDArray[np.int64], found: Sequence[NDArray[np.float64]]) -> _Judged:
    problem = examples.problem
    if not problem.per_base:
        labels = np.asarray(examples.labels)[chosen]
        return _Judged(problem, labels, np.stack(found), None, np.arange(len(labels)))
    each = [np.asarray(examples.labels[number], np.float64) for number in chosen]
    has = ~np.isnan(np.concatenate(each))
    windows = np.repeat(np.arange(len(each)), [len(label) for label in each])[has]
    count = min(len(windows), MOST_BASES)
    spread = np.arange(count) * len(windows) // count
    labels, values = np.concatenate(each)[has][spread], np.concatenate(found)[has][spread]
    return _Judged(problem, labels, values, windows[spread], spread)


def _as_dict(found: dict[str, Estimate]) -> dict[str, dict[str, float | None]]:
    """For JSON, which has no NaN."""
    return {
        name: {key: value if math.isfinite(value) else None for key, value in asdict(each).items()}
        for name, each in found.items()
    }


def as_tables(result: dict[str, Any]) -> list[Table | str]:
    """A result as lines and a table."""
    splits = ", ".join(f"{count:,} {split}" for split, count in result["splits"].items())
    method = result["method"]
    table = new_table(("metric", "model", "95 % from", "to", "baseline", "95 % from", "to"), left=("metric",))
    for name, of_model in result["metrics"].items():
        of_baseline = result["baseline"]["metrics"][name]
        table.add_row(name, *_cells(of_model), *_cells(of_baseline))
    return [
        f"{_shown(result['run'])} (step {result['step']:,}): {result['task']}, {method['mode']} of"
        f" {_shown(result['model'])}",
        f"{splits} examples; seed {result['seed']}; baseline: {result['baseline']['name']}",
        table,
    ]


def _shown(path: str) -> str:
    """A path, relative to the working directory if it lies in it."""
    here = Path.cwd()
    return str(Path(path).relative_to(here)) if Path(path).is_relative_to(here) else path


def _cells(found: dict[str, float | None]) -> list[str]:
    return ["" if found[key] is None else f"{found[key]:.4f}" for key in ("value", "low", "high")]


def write_predictions(
    path: Path,
    loaded: Loaded,
    examples: Examples,
    chosen: NDArray[np.int64],
    found: Sequence[NDArray[np.float64]],
    *,
    labels: bool,
) -> None:
    """Write predictions as a Parquet file, which appears complete.

    Columns: example, prediction (a class or a number), with classes p_CLASS for each, and with `labels` the label. Of
    single bases, each is a list with a value for every base.
    """
    problem = loaded.problem
    columns: dict[str, Any] = {"example": [examples.names[each] for each in chosen]}
    if labels:
        columns["label"] = [_written(problem, examples.labels[each]) for each in chosen]
    columns["prediction"] = [
        _written(problem, row.argmax(axis=-1) if problem.classes else row[..., 0]) for row in found
    ]
    for number, name in enumerate(problem.classes):
        columns[f"p_{name}"] = [row[..., number].tolist() for row in found]
    partial = path.with_name(f"{path.name}.partial")
    parquet.write_table(pa.table(columns), partial)
    partial.rename(path)


def _written(problem: Problem, values: Any) -> Any:
    """A label or its prediction; of single bases a list, with None where there is no label."""
    if np.ndim(values):
        return [_written(problem, value) for value in values.tolist()]
    if not math.isfinite(values):
        return None
    return problem.classes[int(values)] if problem.classes else float(values)


def read_result(directory: Path) -> dict[str, Any] | None:
    """The result in a run directory; None if there is none, or since then training found a better checkpoint."""
    path = RunPaths(directory).result
    if not path.exists():
        return None
    content = json.loads(path.read_bytes())
    assert isinstance(content, dict)
    return content if content["step"] == best_or_none(directory) else None
