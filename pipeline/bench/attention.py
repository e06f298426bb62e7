"""`megabase bench attention`: one attention layer's core, forward and backward, causal, batch 1."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from megabase.pipeline.bench import contest, draw, report
from megabase.pipeline.bench.attention_task import CONTESTANTS, AttentionTask, default_contestants
from megabase.pipeline.bench.contest import Budget
from megabase.pipeline.bench.files import Files
from megabase.pipeline.bench.lab import open_lab
from megabase.pipeline.bench.options import device_of, lengths_of, names_of, positive
from megabase.pipeline.bench.result import Result


@dataclass(frozen=True)
class AttentionOptions:
    """The options of the command; None: the default of the device."""

    lengths: str
    contestants: str | None
    dtype: str | None
    heads: int | None
    head_dim: int | None
    chunk: int | None
    rounds: int
    repeat: int
    seconds: float | None
    device: str
    json: Path | None
    picture: Path | None


def task_of(options: AttentionOptions) -> AttentionTask:
    """The task that the options describe. Raises UserError.

    By default 4 heads of 64 and chunks of 64 in fp32 on a CPU, 8 heads of 128 and chunks of 128 in bf16 on a GPU.
    """
    device = device_of(options.device)
    gpu = device == "cuda"
    task = AttentionTask(
        heads=options.heads if options.heads is not None else (8 if gpu else 4),
        head_dim=options.head_dim if options.head_dim is not None else (128 if gpu else 64),
        chunk=options.chunk if options.chunk is not None else (128 if gpu else 64),
        rounds=options.rounds,
        dtype=options.dtype or ("bf16" if gpu else "fp32"),
        device=device,
    )
    for name in ("heads", "head_dim", "chunk", "rounds"):
        positive(f"--{name.replace('_', '-')}", getattr(task, name))
    return task


def run(options: AttentionOptions) -> int:
    """Measure, print the table, and write the files that the options name.

    Returns:
        The exit code: 1 if a contestant of megabase failed, else 0.

    Raises:
        UserError: an option is wrong.
    """
    task = task_of(options)
    lengths = lengths_of("--lengths", options.lengths)
    names = names_of("--contestants", options.contestants, CONTESTANTS, default_contestants(task.device))
    positive("--repeat", options.repeat)
    seconds = options.seconds if options.seconds is not None else (5.0 if task.device == "cuda" else 40.0)
    positive("--seconds", seconds)
    files = Files.of(options.json, options.picture)

    entries = [CONTESTANTS[name].entry for name in names]
    settings = {**asdict(task), "causal": True, "batch": 1, "seconds": seconds, "repeat": options.repeat}
    result = Result("attention", settings, {entry.name: entry.label for entry in entries})
    lab, budget = open_lab(task, task.device), Budget(seconds, options.repeat)
    contest.hold(entries, lengths, lab, budget, files.collect(result, "length"))
    report.attention_table(result)
    files.write_picture(result, draw.attention)
    return result.exit_code()
