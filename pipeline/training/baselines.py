"""The Markov models that a trained model must beat: their bits per base, for the journal's rows of evaluations."""

from __future__ import annotations

import json
import logging
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from megabase.datamodules.datamodule import SequenceDataModule
from megabase.datamodules.files import publish_json
from megabase.datamodules.report import markov
from megabase.pipeline.rundir.journal import Row
from megabase.pipeline.rundir.paths import RunPaths

logger = logging.getLogger(__name__)


class Baselines(NamedTuple):
    """Bits per base of Markov models of order 0, 1, ... on the validation windows.

    Attributes:
        subset: on the windows of every evaluation (`trainer.eval_sequences`).
        full: on all of them.
    """

    subset: list[float]
    full: list[float]


def baselines(directory: Path, data: SequenceDataModule, most: int, skip: bool) -> Baselines:
    """Fit the models on the training split and score the validation windows.

    Up to order 5; lower for a larger alphabet. Computed once for a run and kept in `baselines.json`. For rank 0.

    Args:
        directory: the run directory.
        data: the windows.
        most: windows of an evaluation; 0: all.
        skip: leave out bases that cannot be read, instead of raising DataError.
    """
    path = RunPaths(directory).baselines
    every = data.validation_windows
    some = min(most, every) or every
    identity = {"data": data.index.segments.identity, "length": data.config.length, "windows": [some, every]}
    # A file that is damaged or of another version is ignored: the models are fitted again.
    with suppress(FileNotFoundError, ValueError, KeyError, TypeError):
        kept = json.loads(path.read_bytes())
        if all(kept[key] == value for key, value in identity.items()):
            return Baselines(*kept["markov_bits_per_base"])
    # Of a large split, as many windows as have SCORE_BASES.
    readable = max(markov.SCORE_BASES // data.config.length, 1)
    scored = {f"{count} validation windows": min(count, readable) for count in (some, every)}
    found = markov.bits_of_parts(
        data.index, {name: data.validation_parts(count) for name, count in scored.items()}, skip=skip
    )
    result = Baselines(*(list(found[f"{count} validation windows"].values()) for count in (some, every)))
    try:
        publish_json(path, {**identity, "markov_bits_per_base": list(result)})
    except OSError as error:  # the next evaluation computes them again
        logger.warning(f"{path} cannot be written: {error.strerror}")
    return result


def evaluation_row(
    step: int, result: dict[str, float], full: dict[str, float] | None, markov_bits: Baselines
) -> Row:
    """The journal's row of one evaluation.

    Args:
        step: of the optimizer.
        result: of `evaluate`, on the windows of every evaluation.
        full: the same on the whole validation split, at the end of a run; None if it was not evaluated.
        markov_bits: of `baselines`.
    """
    row: dict[str, Any] = {"step": step, **result, **_named(markov_bits.subset)}
    if full is not None:
        row |= {f"full_{key}": value for key, value in (full | _named(markov_bits.full)).items()}
    return row


def _named(orders: list[float]) -> dict[str, float]:
    return {f"markov_{order}_bits_per_base": value for order, value in enumerate(orders)}
