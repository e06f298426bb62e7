"""What a fine-tuning reached on its test split, beside its baseline: `result.json`, `predictions.parquet`, a table."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
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
from megabase.pipeline.finetune.baseline import kmer_baseline
from megabase.pipeline.finetune.examples import SPLITS, Examples, Problem
from megabase.pipeline.finetune.metrics import Estimate, estimates
from megabase.pipeline.finetune.predict import Loaded, load_finetuned
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
    labels = np.asarray(examples.labels)[chosen]
    baseline = kmer_baseline(examples, loaded.alphabet)
    result = {
        "run": str(directory),
        "step": loaded.step,
        "seed": config.run.seed,
        **work.record,
        "task": examples.problem.name,
        "splits": {split: examples.splits.count(split) for split in SPLITS},
        "metrics": _as_dict(estimates(examples.problem, labels, np.stack(found))),
        "baseline": {
            "name": baseline.name,
            "metrics": _as_dict(estimates(examples.problem, labels, baseline.found)),
        },
    }
    publish_json(RunPaths(directory).result, result, indent=1)
    return result


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
        f"{result['run']} (step {result['step']:,}): {result['task']}, {method['mode']} of {result['model']}",
        f"{splits} examples; seed {result['seed']}; baseline: {result['baseline']['name']}",
        table,
    ]


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

    Columns: example, prediction (a class or a number), with classes p_CLASS for each, and with `labels` the label.
    """
    problem = loaded.problem
    columns: dict[str, Any] = {"example": [examples.names[each] for each in chosen]}
    if labels:
        columns["label"] = [_written(problem, float(examples.labels[each])) for each in chosen]
    columns["prediction"] = [
        _written(problem, float(row.argmax()) if problem.classes else float(row[0])) for row in found
    ]
    for number, name in enumerate(problem.classes):
        columns[f"p_{name}"] = [float(row[number]) for row in found]
    partial = path.with_name(f"{path.name}.partial")
    parquet.write_table(pa.table(columns), partial)
    partial.rename(path)


def _written(problem: Problem, value: float) -> str | float:
    return problem.classes[int(value)] if problem.classes else value


def read_result(directory: Path) -> dict[str, Any] | None:
    """The result in a run directory; None if there is none."""
    path = RunPaths(directory).result
    if not path.exists():
        return None
    content = json.loads(path.read_bytes())
    assert isinstance(content, dict)
    return content
