"""`megabase bench model`: one training step of a whole model, batch 1, and its memory against length and depth."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from megabase.pipeline.bench import contest, draw, report
from megabase.pipeline.bench.contest import Budget
from megabase.pipeline.bench.files import Files
from megabase.pipeline.bench.lab import open_lab
from megabase.pipeline.bench.model_task import (
    CONTESTANTS,
    ModelTask,
    count_parameters,
    our_model,
    states_bytes,
)
from megabase.pipeline.bench.options import depths_of, device_of, lengths_of, names_of, positive
from megabase.pipeline.bench.result import Result
from megabase.pipeline.errors import UserError


@dataclass(frozen=True)
class ModelOptions:
    """The options of the command; None: the default."""

    lengths: str
    depths: str
    contestants: str | None
    dtype: str
    dim: int
    depth: int
    heads: int
    chunk: int
    rounds: int
    sequence_ranks: int
    repeat: int
    seconds: float | None
    longest: bool
    device: str
    json: Path | None
    picture: Path | None


def task_of(options: ModelOptions, length: int) -> ModelTask:
    """The task that the options describe. Raises UserError, or ConfigError for a model that cannot work."""
    for name in ("dim", "depth", "heads", "chunk", "rounds"):
        positive(f"--{name}", getattr(options, name))
    if options.dim % options.heads:
        raise UserError(f"--dim {options.dim} is not a multiple of --heads {options.heads}")
    if options.heads % options.sequence_ranks:
        raise UserError(
            f"--heads {options.heads} is not a multiple of --sequence-ranks {options.sequence_ranks}: each rank"
            " computes some of the heads"
        )
    task = ModelTask(
        dim=options.dim,
        depth=options.depth,
        heads=options.heads,
        chunk=options.chunk,
        rounds=options.rounds,
        length=length,
        dtype=options.dtype,
        device=device_of(options.device),
        sequence_ranks=options.sequence_ranks,
    )
    our_model(replace(task, depth=1))  # raises ConfigError now, before minutes of measuring
    return task


def run(options: ModelOptions) -> int:
    """Measure over lengths, then over depths at the shortest length; print the tables and write the files.

    Returns:
        The exit code: 1 if a contestant of megabase failed, else 0.

    Raises:
        UserError: an option is wrong.
        ConfigError: the model cannot work.
    """
    lengths = lengths_of("--lengths", options.lengths)
    depths = depths_of("--depths", options.depths)
    positive("--sequence-ranks", options.sequence_ranks)
    for length in lengths:
        if length % options.sequence_ranks:
            raise UserError(
                f"--lengths {length} is not a multiple of --sequence-ranks {options.sequence_ranks}"
            )
    names = names_of("--contestants", options.contestants, CONTESTANTS, list(CONTESTANTS))
    task = task_of(options, lengths[0])
    positive("--repeat", options.repeat)
    seconds = options.seconds if options.seconds is not None else (5.0 if task.device == "cuda" else 60.0)
    positive("--seconds", seconds)
    files = Files.of(options.json, options.picture)

    entries = [CONTESTANTS[name].entry for name in names]
    settings = {
        **asdict(task),
        "batch": 1,
        "optimizer": "AdamW",
        "seconds": seconds,
        "repeat": options.repeat,
    }
    result = Result("model", settings, {entry.name: entry.label for entry in entries})
    result.parameters = count_parameters(task, names)

    collect = partial(files.collect, result)
    lab = open_lab(task, task.device)
    contest.hold(entries, lengths, lab, Budget(seconds, options.repeat), collect("length"))
    deep = replace(task, along="depth")
    result.states_bytes = {depth: states_bytes(deep.at(depth)) for depth in depths}
    contest.hold(entries, depths, open_lab(deep, task.device), Budget(seconds, repeats=0), collect("depth"))
    if options.longest:
        for entry in entries:
            contest.climb(entry, lengths[-1], lab, Budget(seconds, repeats=0), collect("longest"))
    report.model_tables(result)
    files.write_picture(result, draw.model)
    return result.exit_code()
