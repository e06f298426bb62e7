"""The callbacks of `trainer.callbacks`: a user's own code inside `megabase train`.

They are imported in the ranks, which have Lightning, with the working directory at the end of the module path. What can
be checked before ranks start is in `config/callbacks.py`.
"""

from __future__ import annotations

import importlib
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import (
    Checkpoint,
    DeviceStatsMonitor,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateMonitor,
    ProgressBar,
    StochasticWeightAveraging,
)

from megabase.pipeline.config.callbacks import parse, working_directory_on_path
from megabase.pipeline.errors import UserError, first_line

# Callbacks of Lightning that cannot work in `megabase train`, with what does their work there.
_REPLACED: dict[type[pl.Callback], str] = {
    Checkpoint: "megabase train writes its own checkpoints: see checkpoint.*",
    EarlyStopping: "a run ends at trainer.max_steps, or is stopped by a STOP file; checkpoint.keep_best keeps the best",
    ProgressBar: "megabase train shows its own progress",
    LearningRateMonitor: "the journal has the learning rate of every step",
    DeviceStatsMonitor: "it needs a logger, and megabase train has none: see performance.jsonl",
    GradientAccumulationScheduler: "data.global_batch decides how many micro batches a step has",
    StochasticWeightAveraging: "it changes weights and learning rate, which a resumed run could not repeat",
}


def load_callbacks(entries: list[Any]) -> list[pl.Callback]:
    """Import and construct the callbacks of `trainer.callbacks`.

    Raises:
        UserError: a module or class cannot be found or imported, is not a callback, cannot be constructed with its
            arguments, or cannot work in `megabase train`.
    """
    return [_load(path, arguments) for path, arguments in parse(entries)]


def _load(path: str, arguments: dict[str, Any]) -> pl.Callback:
    module_name, _, name = path.rpartition(".")
    try:
        with working_directory_on_path():
            module = importlib.import_module(module_name)
    except Exception as error:
        raise _error(
            path, f"{module_name} cannot be imported: {type(error).__name__}: {first_line(error)}"
        ) from error
    kind = getattr(module, name, None)
    if kind is None:
        raise _error(path, f"{module.__file__ or module_name} has no {name}")
    if not isinstance(kind, type) or not issubclass(kind, pl.Callback):
        raise _error(path, "is not a class derived from pytorch_lightning.Callback")
    for replaced, instead in _REPLACED.items():
        if issubclass(kind, replaced):
            raise _error(path, f"{instead}. It works under a Trainer of your own (docs/lightning.md)")
    try:
        return kind(**arguments)
    except Exception as error:
        given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        raise _error(path, f"{name}({given}) fails: {type(error).__name__}: {first_line(error)}") from error


def _error(path: str, problem: str) -> UserError:
    return UserError(f"trainer.callbacks: {path}: {problem}")
