"""`megabase finetune`: read the examples, train, and say what the result is worth on the test split."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from megabase.datamodules.alphabet import Alphabet
from megabase.datamodules.index.segments import TRAIN
from megabase.models import pretrained
from megabase.pipeline.checkpoint.manifest import MANIFEST, Damaged, list_checkpoints, read_manifest, step_of
from megabase.pipeline.errors import RunError, UserError
from megabase.pipeline.files import read_object
from megabase.pipeline.finetune.bases import known, per_base_examples
from megabase.pipeline.finetune.examples import AUTO, Examples, check_letters, labelled
from megabase.pipeline.finetune.extras import require
from megabase.pipeline.finetune.model import LORA, Method
from megabase.pipeline.finetune.settings import Pretrained, settings_of
from megabase.pipeline.finetune.splits import split_of_each
from megabase.pipeline.finetune.tables import FASTA, Columns, Table, read_fasta, read_folder, read_table
from megabase.pipeline.finetune.task import Finetuning, Work
from megabase.pipeline.inference.model import ALPHABETS, chosen_step
from megabase.pipeline.inference.source import describe
from megabase.pipeline.ranks.environment import is_rank, is_rank_zero, local_devices
from megabase.pipeline.ranks.stop import StopRequest
from megabase.pipeline.ranks.supervisor import is_supervised
from megabase.pipeline.rundir.paths import CHECKPOINTS, RunPaths
from megabase.pipeline.tables import show
from megabase.pipeline.training.run import train

logger = logging.getLogger(__name__)

DEFAULT_SEED = 1
DEFAULT_WINDOW = 1024


@dataclass(frozen=True)
class FinetuneOptions:
    """The command line.

    Attributes:
        model: a run directory or an export; to predict, the run of a fine-tuning.
        table: a table, or a folder.
        output: the run directory; to predict, the Parquet file.
        settings: as "key.path=value".
        method: what is trained, and the pooling.
        task: see `examples.labelled`.
        columns: of a table.
        genome: FASTA: `table` is BED or bigWig, with a label for each base; None: a label for each sequence.
        window: bases of a window of the genome; None: as in the model's training.
        step: of the model's checkpoint; see `load_model`.
        predict: do not train.
        as_json: print the result as JSON.
    """

    model: Path
    table: Path
    output: Path
    settings: Sequence[str] = ()
    method: Method = field(default_factory=Method)
    task: str = AUTO
    columns: Columns = field(default_factory=Columns)
    genome: Path | None = None
    window: int | None = None
    step: int | str | None = None
    predict: bool = False
    as_json: bool = False


def run(options: FinetuneOptions, arguments: list[str], stop: StopRequest) -> int:
    """Fine-tune, or go on with a fine-tuning; then write and print the result.

    Args:
        options: the command line.
        arguments: the same after `megabase finetune`, to start ranks with.
        stop: set by the signals of this process.

    Returns:
        The exit code, see `training.run.train`.

    Raises:
        UserError, DataError, ConfigError: bad input; nothing was started.
        RunError: the result cannot be written.
    """
    if is_supervised() or not is_rank_zero():
        # The process that started this rank has said it, or rank 0 does.
        logging.getLogger("megabase.pipeline.finetune").setLevel(logging.ERROR)
    require("sklearn")  # the baseline needs it, after the training
    if options.method.mode == LORA:
        require("peft")
    run_directory = options.output.absolute()
    model = pretrained_of(options.model, options.step)
    examples = read_examples(options, model)
    devices = _devices(options.settings)
    config = settings_of(
        model,
        options.table.absolute(),
        run_directory,
        options.method.mode,
        examples,
        options.settings,
        devices,
    )
    work = Work(model, options.step, examples, options.method)
    code = train(config, arguments, stop, Finetuning(config, work))
    if code or is_supervised() or (is_rank() and not is_rank_zero()):
        return code
    from megabase.pipeline.finetune.result import as_tables, read_result, write_result

    try:
        result = read_result(run_directory) or write_result(config, work)
    except OSError as error:
        raise RunError(f"{run_directory} cannot be written: {error.strerror or error}") from None
    if options.as_json:
        print(json.dumps(result, indent=1))
    else:
        show(*as_tables(result))
    return code


def predict(options: FinetuneOptions) -> int:
    """Predict the rows of a table with a fine-tuned model; returns the exit code.

    Raises:
        UserError: bad input, or no such model.
        RunError: the checkpoint cannot be read, or the file cannot be written.
    """
    from megabase.pipeline.finetune.predict import load_finetuned, unlabelled
    from megabase.pipeline.finetune.result import write_predictions

    require("sklearn")
    if options.settings:
        raise UserError(f"{options.settings[0]}: --predict takes no settings")
    step = chosen_step(options.model, options.step)
    loaded = load_finetuned(options.model, step)
    if options.table.suffix in FASTA or options.table.with_suffix("").suffix in FASTA:
        table = read_fasta(options.table)
    else:
        table = _read(options.table, replace(options.columns, label=None))
    check_letters(table.sequences, loaded.alphabet, options.table)
    examples = unlabelled(table.names, table.sequences, loaded.problem)
    chosen = np.arange(len(examples))
    found = loaded.predict(examples, chosen)
    try:
        write_predictions(options.output, loaded, examples, chosen, found, labels=False)
    except OSError as error:
        raise RunError(f"{options.output} cannot be written: {error.strerror or error}") from None
    summary = {
        "run": str(options.model),
        "step": loaded.step,
        "examples": len(examples),
        "output": str(options.output),
    }
    if options.as_json:
        print(json.dumps(summary))
    else:
        show(f"{options.output}: {len(examples):,} predictions of {options.model} (step {loaded.step:,})")
    return 0


def pretrained_of(path: Path, step: int | str | None) -> Pretrained:
    """The model to start from. Raises UserError if there is none, or ConfigError."""
    if RunPaths(path).finetune.exists():
        raise UserError(f"{path} is the run of a fine-tuning: give the pretrained model that it started from")
    chosen = None
    if RunPaths(path).checkpoints.is_dir():
        chosen = chosen_step(path, step)
        if chosen is not None and chosen not in map(step_of, list_checkpoints(RunPaths(path).checkpoints)):
            raise UserError(
                f"--step {chosen}: {path} has no such checkpoint: `megabase checkpoints {path}` lists them"
            )
    elif not (path / pretrained.CONFIG).exists():
        raise UserError(f"{path} holds no model: give a run directory, or what `megabase export` wrote")
    elif step is not None:
        raise UserError(f"--step {step}: {path} is an export, of one checkpoint: leave it out")
    source = describe(path if chosen is None else path / CHECKPOINTS / f"step-{chosen}")
    alphabet = source.alphabet
    if alphabet is None:  # of an early version
        sizes = {Alphabet.named(name).vocab_size: name for name in ALPHABETS}
        alphabet = sizes.get(source.model.vocab_size or 0, "dna")
    return Pretrained(path.absolute(), source.model, alphabet, _trained_length(source.path))


def _trained_length(source: Path) -> int | None:
    """Bases of a window of the training that made a checkpoint or an export; None: not recorded."""
    settings: Any = read_object(source / pretrained.CONFIG).get("settings", {})
    if (source / MANIFEST).exists():
        try:
            settings = read_manifest(source).config
        except (Damaged, OSError):
            return None
    length = settings.get("data.length") if isinstance(settings, dict) else None
    return int(length) if isinstance(length, int) else None


def read_examples(options: FinetuneOptions, model: Pretrained) -> Examples:
    """The labelled sequences, with their splits.

    Raises:
        UserError: see `read_table`, `read_folder`, `labelled` and `split_of_each`; or the training split has one class.
    """
    alphabet, source = Alphabet.named(model.alphabet), options.table
    if options.genome is not None:
        window = options.window or model.length or DEFAULT_WINDOW
        return _scaled(per_base_examples(source, options.genome, alphabet, window), source)
    table = _read(source, options.columns)
    problem, labels = labelled(table, options.task, source)
    check_letters(table.sequences, alphabet, source)
    splits = split_of_each(table, alphabet, _seed(options.settings), source)
    return _scaled(Examples(problem, table.names, table.sequences, labels, splits), source)


def _scaled(examples: Examples, source: Path) -> Examples:
    """The examples, with mean and scale of the training split; raises UserError if nothing can be learned from it."""
    problem = examples.problem
    if problem.per_base:
        of_training = known(examples.labels, examples.of(TRAIN))
    else:
        of_training = np.asarray(examples.labels)[examples.of(TRAIN)]
    if problem.classes:
        if len(np.unique(of_training)) < 2:
            only = problem.classes[int(of_training[0])]
            raise UserError(
                f"{source}: every label of the training split is {only!r}: it needs two classes or more"
            )
        return examples
    scale = float(of_training.std())
    if not scale:
        raise UserError(
            f"{source}: every number of the training split is {of_training[0]:g}: nothing can be learned"
        )
    return replace(examples, problem=replace(problem, mean=float(of_training.mean()), scale=scale))


def _read(source: Path, columns: Columns) -> Table:
    return read_folder(source) if source.is_dir() else read_table(source, columns)


def _setting(settings: Sequence[str], key: str) -> str | None:
    """The value of the last KEY=VALUE; None if it is not given."""
    return next((each.partition("=")[2] for each in reversed(settings) if each.startswith(f"{key}=")), None)


def _seed(settings: Sequence[str]) -> int:
    """`run.seed`, which the splits are drawn with. A value that is no number is refused with the other settings."""
    value = _setting(settings, "run.seed") or ""
    return int(value) if value.lstrip("-").isdecimal() else DEFAULT_SEED


def _devices(settings: Sequence[str]) -> int:
    """Ranks, for the size of a micro batch."""
    devices, nodes = (_setting(settings, f"trainer.{name}") or "" for name in ("devices", "nodes"))
    here = int(devices) if devices.isdecimal() else local_devices(None)
    return max(here, 1) * (int(nodes) if nodes.isdecimal() else 1)
