"""The weights that a new run starts from (`run.init_from`): which of a source's weights fit its model, and how.

A weight fits if the source has one of the same name and shape. A position table of another length fits as well: its
rows are repeated or cut (Beltagy et al. 2020, section 5, extend learned positions in this way). Nothing else of the
source is used: the new run has its own step, optimizer states, data and order.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megabase.datamodules.errors import DataError
from megabase.datamodules.files import publish_json
from megabase.models import pretrained
from megabase.models.config import ConfigError, ReformerConfig
from megabase.models.reformer import Reformer
from megabase.pipeline.config.keys import flatten
from megabase.pipeline.config.schema import RunConfig
from megabase.pipeline.errors import RunError, UserError
from megabase.pipeline.files import read_object
from megabase.pipeline.inference.source import Description, OpenSource, describe, open_source
from megabase.pipeline.ranks.groups import Group
from megabase.pipeline.rundir.paths import RunPaths

logger = logging.getLogger(__name__)

# Tables of positions, which fit another number of rows. Axial rows do so only if the columns are the same.
TABLE = "body.embedding.positions.table"
ROWS, COLUMNS = "body.embedding.positions.rows", "body.embedding.positions.columns"
MISSING = "not in the source"
# An error names so many weights.
NAMED = 6


@dataclass(frozen=True)
class Fit:
    """Which weights of a model come from a source.

    Attributes:
        copied: taken as they are.
        repeated: position tables of another length: name -> (rows of the source, rows of the model).
        fresh: weights that do not fit, which start from random values: name -> why.
        unused: weights of the source that the model does not have.
    """

    copied: tuple[str, ...]
    repeated: Mapping[str, tuple[int, int]]
    fresh: Mapping[str, str]
    unused: tuple[str, ...]

    def value(self, name: str, weight: Tensor) -> Tensor:
        """The model's weight `name`, made from the source's."""
        if name not in self.repeated:
            return weight
        return weight[torch.arange(self.repeated[name][1]) % len(weight)]


def fit_weights(source: Mapping[str, torch.Size], wanted: Mapping[str, torch.Size]) -> Fit:
    """Compare the shapes of a source's weights with those of a model, both by name."""
    copied, repeated, fresh = [], {}, {}
    for name, shape in wanted.items():
        found = source.get(name)
        if found == shape:
            copied.append(name)
        elif found is None:
            fresh[name] = MISSING
        elif _is_longer_table(name, found, shape, source, wanted):
            repeated[name] = (found[0], shape[0])
        else:
            fresh[name] = f"{tuple(shape)}, in the source {tuple(found)}"
    if COLUMNS in fresh and ROWS in copied:
        # Rows of another width in columns: the same row stands for other positions.
        copied.remove(ROWS)
        fresh[ROWS] = "its columns do not fit"
    unused = tuple(name for name in source if name not in wanted)
    missing_last = dict(sorted(fresh.items(), key=lambda item: item[1] == MISSING))
    return Fit(tuple(copied), repeated, missing_last, unused)


def _is_longer_table(
    name: str,
    found: torch.Size,
    shape: torch.Size,
    source: Mapping[str, torch.Size],
    wanted: Mapping[str, torch.Size],
) -> bool:
    """Whether this is a table of positions that differs only in its number of rows."""
    if found[1:] != shape[1:]:
        return False
    return name == TABLE or (name == ROWS and source.get(COLUMNS) == wanted.get(COLUMNS))


def check_initial(config: RunConfig, alphabet: str) -> None:
    """Check from settings alone that `run.init_from` fits the model of a run.

    Args:
        config: of the run; `model.vocab_size` is set.
        alphabet: of its shards.

    Raises:
        UserError: there is no such source, or it has another alphabet, or weights do not fit and `run.init_partial` is
            false.
        ConfigError: the source's settings cannot work.
    """
    assert config.run.init_from is not None
    _fitting(config, alphabet, describe(Path(config.run.init_from)))


def _fitting(config: RunConfig, alphabet: str, source: Description) -> Fit:
    """How a source fits the model of a run. Raises UserError as `check_initial`."""
    if source.alphabet not in (None, alphabet):
        raise UserError(
            f"run.init_from={config.run.init_from}: its tokens are of the alphabet {source.alphabet}, those of"
            f" {config.data.shards} of {alphabet}: prepare the data with --alphabet {source.alphabet}"
        )
    fit = fit_weights(source.shapes, pretrained.stored_shapes(pretrained.empty(config.model)))
    if fit.fresh and not config.run.init_partial:
        changed = [
            f"{key} is {now} here and {before} there"
            for key, (before, now) in _changed(source.model, config.model).items()
        ]
        settings = f" Settings that differ: {'; '.join(changed)}." if changed else ""
        # A model of which little would be left is another model: no way out.
        partial = ", or set run.init_partial=true to start these weights from random values"
        raise UserError(
            f"run.init_from={config.run.init_from}: {len(fit.fresh)} weights of the model do not fit: "
            f"{_listed(fit.fresh)}.{settings}{_hint(fit, source, config.model)} Change the settings under model"
            f"{partial if len(fit.copied) > len(fit.fresh) else ''}"
        )
    return fit


def _listed(fresh: Mapping[str, str]) -> str:
    named = [f"{name} ({reason})" for name, reason in list(fresh.items())[:NAMED]]
    more = len(fresh) - len(named)
    return "; ".join(named) + (f"; and {more} more" if more else "")


def _hint(fit: Fit, source: Description, model: ReformerConfig) -> str:
    """How to keep axial positions, where their columns do not fit."""
    if COLUMNS not in fit.fresh or source.model.positions != "axial" or not model.max_length:
        return ""
    columns = source.shapes[COLUMNS][0]
    return f" To keep its positions, set model.axial_shape=[{-(-model.max_length // columns)},{columns}]."


@dataclass(frozen=True)
class InitialWeights:
    """Fills a new model with the weights of a source. `PretrainModule.configure_model` calls it.

    Attributes:
        source: opened, and its files were checked. Opened before the model is built: under stage 3 DeepSpeed shards
            every module that is built meanwhile, and opening a source builds one.
        fit: which of its weights the model takes.
    """

    source: OpenSource
    fit: Fit

    @property
    def checkpoint(self) -> Path:
        """The checkpoint or the export, absolute."""
        return self.source.description.path.absolute()

    def __call__(self, model: Reformer) -> None:
        """Copy the weights. All ranks call it; where the model is sharded, rank 0 alone reads the source."""
        from megabase.pipeline.zero.construction import fill

        def value_of(name: str) -> Tensor:
            return self.fit.value(name, self.source.read(name))

        fill(model, {*self.fit.copied, *self.fit.repeated}, value_of)


def choose_initial(config: RunConfig, alphabet: str, world: Group) -> InitialWeights | None:
    """The weights that a start at step 0 takes; None without `run.init_from`. All ranks call it.

    Raises:
        RunError: on every rank, if rank 0 cannot use the source: see `check_initial` and `open_source`.
    """
    if config.run.init_from is None:
        return None
    error, chosen = None, None
    if world.rank == 0:
        try:
            chosen = open_initial(config, alphabet)
        except (UserError, ConfigError, DataError, RunError) as caught:
            error = str(caught)
    world.check(error)
    path, fit = world.broadcast((chosen.checkpoint, chosen.fit) if chosen else None)
    return chosen or InitialWeights(open_source(path, check_files=False), fit)


def open_initial(config: RunConfig, alphabet: str) -> InitialWeights:
    """Check the source's files and how they fit, and write `init_from.json` into the run directory. For rank 0.

    A run that starts at step 0 once more takes the same checkpoint as before, even if its source has trained on.

    Raises:
        UserError, ConfigError, RunError: see `check_initial` and `open_source`, or the file cannot be written.
    """
    record = RunPaths(config.directory).init_from
    assert config.run.init_from is not None
    opened = _open(_recorded(record, config.run.init_from), config.run.init_from)
    source = opened.description
    fit = _fitting(config, alphabet, source)
    initial = InitialWeights(opened, fit)
    try:
        config.directory.mkdir(parents=True, exist_ok=True)
        publish_json(record, _record(config, source, initial))
    except OSError as error:
        raise RunError(f"{record} cannot be written: {error.strerror or error}") from None
    _report(source, fit, config)
    return initial


def _open(recorded: Path | None, init_from: str) -> OpenSource:
    """Open the checkpoint of an earlier start, or if that is damaged by now, what the setting names."""
    if recorded is not None:
        try:
            return open_source(recorded)
        except (UserError, ConfigError, RunError) as error:
            logger.warning(
                f"this run took its weights from {recorded}, which cannot be used any more: {error}"
            )
    return open_source(Path(init_from))


def _recorded(record: Path, init_from: str) -> Path | None:
    """The checkpoint that an earlier start at step 0 took, if it is still there."""
    kept = read_object(record)
    if kept.get("init_from") != init_from or not isinstance(kept.get("checkpoint"), str):
        return None
    path = Path(kept["checkpoint"])
    if not path.exists():
        logger.warning(
            f"{path}, which this run took its weights from, is gone: it takes newer ones of {init_from}"
        )
        return None
    return path


def _record(config: RunConfig, source: Description, initial: InitialWeights) -> dict[str, Any]:
    return {
        "init_from": config.run.init_from,
        "checkpoint": str(initial.checkpoint),
        "step": source.step,
        "changed": _changed(source.model, config.model),
        "copied": len(initial.fit.copied),
        "repeated": dict(initial.fit.repeated),
        "fresh": dict(initial.fit.fresh),
        "unused": list(initial.fit.unused),
    }


def _changed(before: ReformerConfig, now: ReformerConfig) -> dict[str, list[Any]]:
    """The settings under `model` that differ: key -> [in the source, in the run]."""
    old, new = (flatten(asdict(each), "model.") for each in (before, now))
    return {key: [old.get(key), new[key]] for key in new if old.get(key) != new[key]}


def _report(source: Description, fit: Fit, config: RunConfig) -> None:
    lines = [f"{len(fit.copied)} weights from {source.path} (step {source.step:,})"]
    lines += [f"{name}: {old:,} rows repeated to {new:,}" for name, (old, new) in fit.repeated.items()]
    if fit.fresh:
        lines.append(f"random at the start: {_listed(fit.fresh)}")
    if fit.unused:
        lines.append(f"not used: {', '.join(fit.unused[:NAMED])}{' ...' if len(fit.unused) > NAMED else ''}")
    changed = _changed(source.model, config.model).items()
    lines += [f"{key}: there {old}, here {new}" for key, (old, new) in changed]
    logger.info(f"run.init_from: {'; '.join(lines)}")
