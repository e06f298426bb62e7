"""`megabase evaluate`: check the input, start ranks if there are several, measure, write the result.

Every rank loads the model and scores its share of the windows; rank 0 prints and writes.
"""

from __future__ import annotations

import json
import logging
import signal
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist

from megabase.datamodules.batches.numbered import Place
from megabase.datamodules.batches.visits import Windows, evaluation_windows
from megabase.datamodules.errors import DataError
from megabase.datamodules.files import publish_json
from megabase.datamodules.index.segments import TEST, TRAIN, VALID
from megabase.datamodules.index.shard_index import ShardIndex
from megabase.datamodules.report import markov, recall
from megabase.datamodules.report.classes import Classes
from megabase.models.config import ConfigError, ReformerConfig
from megabase.pipeline.config.load import with_settings
from megabase.pipeline.config.schema import RunConfig, RunSettings, TrainerConfig
from megabase.pipeline.errors import RunError, UserError
from megabase.pipeline.hardware import Machine, precision_of
from megabase.pipeline.inference.evaluation import measure
from megabase.pipeline.inference.evaluation.compressors import compress
from megabase.pipeline.inference.evaluation.measure import LOWER, Parts, Scorer
from megabase.pipeline.inference.evaluation.picture import draw
from megabase.pipeline.inference.evaluation.result import (
    Context,
    Copy,
    Evaluation,
    Named,
    Position,
    Recall,
)
from megabase.pipeline.inference.evaluation.table import as_tables
from megabase.pipeline.inference.evaluation.tally import Tally
from megabase.pipeline.inference.model import LoadedModel, load_model
from megabase.pipeline.ranks import rendezvous, supervisor
from megabase.pipeline.ranks.environment import (
    complete_environment,
    is_rank,
    is_rank_zero,
    local_devices,
    refuse_oversubscription,
)
from megabase.pipeline.ranks.groups import Groups
from megabase.pipeline.ranks.stop import STOP_SIGNALS, StopRequest
from megabase.pipeline.rundir.paths import RunPaths
from megabase.pipeline.tables import show

logger = logging.getLogger(__name__)

MUTATED = 0.03
JSON, PICTURE = "evaluation.json", "evaluation.png"


@dataclass(frozen=True)
class EvaluateOptions:
    """The arguments of the command.

    Attributes:
        model: a run directory or an export.
        settings: KEY=VALUE settings over those of the run.
        split: name of the split.
        shards: directory or URL; None: those of the training.
        lengths: of the windows; (): that of the training. The longest is the length of the windows; with several, the
            same bases are scored in contexts of each length as well.
        step: of the checkpoint; "best"; None: the newest intact one.
        windows: number of windows, spread evenly over the split; 0: all.
        recall: number of windows in which recall is measured; 0: none.
        annotation: file of classes: GFF or BED.
        output: directory for the result as JSON and PNG.
        json: print JSON instead of tables.
    """

    model: Path
    settings: tuple[str, ...] = ()
    split: str = "test"
    shards: str | None = None
    lengths: tuple[int, ...] = ()
    step: int | str | None = None
    windows: int = 0
    recall: int = 32
    annotation: Path | None = None
    output: Path | None = None
    json: bool = False


@dataclass(frozen=True, eq=False)
class Task:
    """A checked evaluation.

    Attributes:
        loaded: the model and its settings.
        windows: of the split, of the longest length.
        lengths: of the contexts, sorted.
        classes: of the BED file, if there is one.
        step: of the checkpoint; None for an export.
    """

    loaded: LoadedModel
    windows: Windows
    lengths: tuple[int, ...]
    classes: Classes | None
    step: int | None


def run(options: EvaluateOptions, arguments: Sequence[str]) -> int:
    """Evaluate a model; returns the exit code.

    Args:
        options: of the command line.
        arguments: the command line after `megabase evaluate`, to start ranks with.

    Raises:
        UserError, DataError, ConfigError: bad input; nothing was written.
        RunError: a file cannot be read or written.
    """
    trainer = _trainer(options.settings)
    devices = local_devices(trainer.devices)
    RunConfig(run=RunSettings(name="model"), trainer=trainer).data_ranks(trainer.nodes * devices)
    if is_rank():
        return _run_rank(options, trainer, devices)
    if trainer.nodes > 1:
        raise UserError(f"trainer.nodes={trainer.nodes}: start it with slurm/evaluate.sbatch, or with srun")
    if devices > 1 and not (machine := Machine.this()).gpus:
        refuse_oversubscription(devices, machine.cpus, f"take trainer.devices={machine.cpus}")
    task = prepare(options)
    if devices > 1:
        logger.info(f"starting {devices} ranks")
        step = [] if task.step is None else ["--step", str(task.step)]
        command = supervisor.megabase_command("evaluate", *arguments, *step)
        return supervisor.supervise(command, devices, StopRequest(), hint=lambda: "nothing was written")
    _finish(options, evaluate_model(options, task, None))
    return 0


def _trainer(settings: Sequence[str]) -> TrainerConfig:
    """The settings of `trainer`, which say how many ranks there are, before a model is loaded."""
    base = RunConfig(run=RunSettings(name="model"))
    base.data.shards = ""
    return with_settings(base, {}, "", [text for text in settings if text.startswith("trainer.")]).trainer


def _run_rank(options: EvaluateOptions, trainer: TrainerConfig, devices: int) -> int:
    """Evaluate as one of several ranks; returns the exit code."""
    # A supervisor starts its ranks with these signals blocked. There is nothing to save, so they end a rank at once.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    complete_environment(trainer.nodes, devices)
    # Rank 0 checks the input first, so that an error is reported once: then the launcher ends the others, which wait.
    task = prepare(options) if is_rank_zero() else None
    rendezvous.start()
    groups = Groups.create(trainer.sequence_ranks)
    # The run may be training: all ranks take the checkpoint that rank 0 found.
    step = groups.world.broadcast(task.step if task else None)
    if task is None:
        logging.getLogger("megabase").setLevel(logging.ERROR)
        task = prepare(options if step is None else replace(options, step=step))
    found = evaluate_model(options, task, groups)
    if groups.world.rank == 0:
        _finish(options, found)
    groups.world.check(None)
    dist.destroy_process_group()
    return 0


def prepare(options: EvaluateOptions) -> Task:
    """Load the model, open the shards and check what can be checked before a base is scored."""
    loaded = load_model(options.model, options.step, options.settings)
    config = loaded.config
    for length in options.lengths:
        _check_length(config.model, length)
    lengths = tuple(sorted({*options.lengths})) or (config.data.length,)
    replace(config, data=replace(config.data, length=lengths[-1])).check_sequence_ranks()
    shards = options.shards or config.data.shards
    if not shards:
        raise UserError(f"{options.model} does not say which shards it was trained on: give --shards DIR")
    try:
        index = ShardIndex.open(shards)
    except DataError as error:
        if options.shards:
            raise
        raise UserError(
            f"{error} (these are the shards of the training; --shards DIR gives others)"
        ) from None
    if index.alphabet.name != loaded.alphabet.name:
        raise UserError(
            f"{shards} has the alphabet {index.alphabet.name}, but the model was trained on {loaded.alphabet.name}:"
            f" give shards that were prepared with --alphabet {loaded.alphabet.name}"
        )
    _check_split(index, options.split, shards)
    if not config.data.pack:
        _check_longest(index, options.split, lengths[-1])
    windows = evaluation_windows(replace(config.data, length=lengths[-1]), index, options.split)
    classes = None
    if options.annotation:
        classes = Classes.read(options.annotation, index.segments, options.split)
    is_run = RunPaths(options.model).checkpoints.is_dir()
    return Task(loaded, windows, lengths, classes, loaded.source.step if is_run else None)


def evaluate_model(options: EvaluateOptions, task: Task, groups: Groups | None) -> Evaluation:
    """Score this rank's share of everything; returns the result of all ranks, on rank 0 with its baselines.

    Raises:
        DataError: bases cannot be read, or none was scored.
    """
    windows, config = task.windows, task.loaded.config
    scorer = _scorer(task, groups)
    logger.info(f"scoring {_count(options.windows, windows):,} windows of {windows.plan.length:,} bases")
    parts, tally = measure.score_windows(scorer, windows, options.windows, task.classes)
    total = tally.mean(0)
    if total is None:
        raise DataError(f"split {options.split!r} of {windows.index.directory}: no base was scored")
    contexts: list[Context] = []
    if len(task.lengths) > 1:
        logger.info(f"scoring contexts of {', '.join(f'{length:,}' for length in task.lengths)} bases")
        found = measure.score_contexts(scorer, windows, options.windows, task.lengths)
        contexts = [Context(length, found.mean(group)) for group, length in enumerate(task.lengths)]
    copies = _measure_recall(scorer, windows, options.recall) if options.recall else None
    is_main = groups is None or groups.world.rank == 0
    return Evaluation(
        model=task.loaded.source,
        shards=str(windows.index.directory),
        split=options.split,
        alphabet=windows.index.alphabet.name,
        objective=config.data.objective,
        length=windows.plan.length,
        windows=len(tally.samples),
        bits_per_base=total,
        markov=_markov(windows, options.split) if is_main else {},
        compressors=compress(windows.index, options.split, skip=windows.skip) if is_main else [],
        positions=[
            Position(start, end, tally.mean(of))
            for (start, end), of in zip(parts.bins, parts.of_bins, strict=True)
        ],
        contexts=contexts,
        cases=_cases(parts, tally),
        classes=[
            Named(name, tally.mean(of)) for name, of in zip(parts.classes, parts.of_classes, strict=True)
        ],
        recall=copies,
    )


def _cases(parts: Parts, tally: Tally) -> list[Named]:
    """By letter case, if any letter is in lower case."""
    found = [Named(name, tally.mean(of)) for name, of in zip(parts.cases, parts.of_cases, strict=True)]
    return found if any(each.name == LOWER and each.bits for each in found) else []


def _scorer(task: Task, groups: Groups | None) -> Scorer:
    config = task.loaded.config
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    precision = precision_of(config.trainer.precision)
    return Scorer(
        model=task.loaded.model.to(device),
        place=groups.place(config.data.micro_batch) if groups else Place(0, 1, config.data.micro_batch),
        groups=groups,
        precision="32" if precision == "16" and not cuda else precision,
        seed=config.run.seed,
    )


def _measure_recall(scorer: Scorer, windows: Windows, most: int) -> Recall | None:
    """Copies of each kind at each distance; None if no copy fits the windows."""
    length, alphabet = windows.plan.length, windows.index.alphabet
    copy = recall.copy_length(length)
    if copy is None:
        logger.info(f"recall is not measured: windows of {length} bases are too short")
        return None
    kinds = {"exact": recall.Source(copy), "mutated": recall.Source(copy, changed=MUTATED)}
    if alphabet.complement is not None:
        kinds["inverted"] = recall.Source(copy, inverted=True)
    distances = recall.distances(length, copy)
    logger.info(f"measuring recall: {len(kinds)} kinds of copies at {len(distances)} distances")
    without = measure.score_copies(scorer, windows, most, copy, None, distances[0])
    copies = []
    for kind, source in kinds.items():
        for distance in distances:
            found = measure.score_copies(scorer, windows, most, copy, source, distance)
            copies.append(Copy(kind, distance, found.mean(0), found.gain(0, without, 0)))
    return Recall(copy, recall.WARM_UP, MUTATED, without.mean(0), copies)


def _markov(windows: Windows, split: str) -> dict[int, float]:
    """Bits per base of Markov models of the training split; empty if the shards have no such split."""
    if TRAIN not in windows.index.segments.splits():
        logger.info(f"no Markov models: {windows.index.directory} has no split {TRAIN!r} to fit them on")
        return {}
    return markov.bits_per_base(windows.index, score=split, skip=windows.skip)


def _check_length(model: ReformerConfig, length: int) -> None:
    try:
        model.validate(length)
    except ConfigError as error:
        longest = model.max_length
        if "linformer" in model.layers and longest:
            why = f"its linformer layers take {longest} bases only: give --length {longest}"
        elif longest and length > longest:
            why = (
                f"its table of positions (model.positions={model.positions}) ends at {longest}: give --length {longest}"
                " or less; models trained with model.positions=rotary take any length"
            )
        else:
            why = str(error)
        raise UserError(f"--length {length}: the model cannot take it: {why}") from None


def _check_split(index: ShardIndex, split: str, shards: str) -> None:
    if split in (held := index.segments.splits()):
        return
    other = VALID if VALID in held else held[0]
    prepared = f", or prepare shards with --{split}" if split in (VALID, TEST) else ""
    raise UserError(
        f"{shards} has no split {split!r}, only {', '.join(held)}: score another with --split {other}{prepared}"
    )


def _check_longest(index: ShardIndex, split: str, length: int) -> None:
    longest = int(index.segments.length[index.segments.rows_of(split)].max())
    if longest < length:
        raise UserError(
            f"split {split!r} has no window of {length}: the longest part of a record in it has {longest}: give"
            f" --length {longest} or less, or data.pack=true, which joins short records"
        )


def _count(most: int, windows: Windows) -> int:
    return min(most, len(windows.plan)) if most else len(windows.plan)


def _finish(options: EvaluateOptions, found: Evaluation) -> None:
    """Print the result, and write its files. Raises RunError if they cannot be written."""
    if options.json:
        print(json.dumps(found.as_dict(), indent=2))
    else:
        show(*as_tables(found))
    if options.output is None:
        return
    try:
        options.output.mkdir(parents=True, exist_ok=True)
        publish_json(options.output / JSON, found.as_dict(), indent=2)
        draw(found, options.output / PICTURE)
    except OSError as error:
        raise RunError(f"{options.output} cannot be written: {error.strerror or error}") from None
    logger.info(f"written: {options.output / JSON} and {options.output / PICTURE}")
