"""The Markov models that a trained model must beat: their bits per base, for the journal's rows of evaluations."""

from __future__ import annotations

import json
import logging
from contextlib import suppress
from pathlib import Path
from typing import Any

from megabase.datamodules.files import publish_json
from megabase.datamodules.index.shard_index import ShardIndex
from megabase.datamodules.report import markov
from megabase.pipeline.rundir.journal import Row
from megabase.pipeline.rundir.paths import RunPaths

logger = logging.getLogger(__name__)


def baselines(directory: Path, index: ShardIndex, skip: bool) -> list[float]:
    """Bits per base of Markov models of order 0, 1, ..., fitted on the training and scored on the validation split.

    Up to order 5; lower for a larger alphabet. Computed once for a run and kept in `baselines.json`. For rank 0.

    Args:
        directory: the run directory.
        index: of the shards.
        skip: leave out bases that cannot be read, instead of raising DataError.
    """
    path = RunPaths(directory).baselines
    identity = index.segments.identity
    # A file that is damaged or of another version is ignored: the models are fitted again.
    with suppress(FileNotFoundError, ValueError, KeyError, TypeError):
        kept = json.loads(path.read_bytes())
        if kept["data"] == identity:
            known: list[float] = kept["markov_bits_per_base"]
            return known
    orders = list(markov.bits_per_base(index, skip=skip).values())
    try:
        publish_json(path, {"data": identity, "markov_bits_per_base": orders})
    except OSError as error:  # the next evaluation computes them again
        logger.warning(f"{path} cannot be written: {error.strerror}")
    return orders


def evaluation_row(step: int, result: dict[str, float], orders: list[float]) -> Row:
    """The journal's row of one evaluation.

    Args:
        step: of the optimizer.
        result: of `evaluate`.
        orders: of `baselines`.
    """
    row: dict[str, Any] = {"step": step, **result}
    return row | {f"markov_{order}_bits_per_base": value for order, value in enumerate(orders)}
