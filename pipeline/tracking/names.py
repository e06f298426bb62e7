"""The names that the journal's numbers have in MLflow: groups, which its pages show one below the other."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

# Prefix in the journal, and group in MLflow. The first that fits counts; what fits none is in `train`.
_GROUPS = (
    ("full_valid_", "full_valid/"),
    ("valid_", "valid/"),
    ("checkpoint_", "checkpoint/"),
    ("peak_memory_", "memory/peak_"),
    ("rank_memory_", "memory/rank_"),
    ("lsh_", "lsh/layer_"),
)
_SPEED = re.compile(r"tokens_per_second.*|.*tflops|mfu|hfu|step_seconds_.*|data_wait")
# A loss above this many nats has no perplexity that is worth a point.
_LARGEST_LOSS = 50.0


def metrics_of(name: str, value: float) -> Iterator[tuple[str, float]]:
    """The metrics of one number of the journal: (name, value).

    A loss has its perplexity beside it, exp(loss).
    """
    metric = metric_name(name)
    yield metric, value
    if metric.endswith("/loss") and value < _LARGEST_LOSS:
        yield metric.removesuffix("loss") + "perplexity", math.exp(value)


def metric_name(name: str) -> str:
    """The name in MLflow of a number of metrics.jsonl or performance.jsonl."""
    if _SPEED.fullmatch(name):
        return f"speed/{name}"
    for prefix, group in _GROUPS:
        if name.startswith(prefix):
            return group + name.removeprefix(prefix)
    return f"train/{name}"


def system_name(node: str, name: str) -> str:
    """The name in MLflow of a number of `logs/system-NODE.jsonl`."""
    return f"system/{node}/{name}"
