"""`megabase generate`: sequences that a model draws letter by letter, after prompts or from nothing.

`drawing` draws them. What a batch drew is one task of `partial`, which keeps what is finished over a kill and shares
the batches among processes. The output is a FASTA file, and a JSONL file with the log-probability of every letter.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megabase.datamodules.progress import bar
from megabase.models.generation import Sampling, start
from megabase.pipeline.errors import UserError
from megabase.pipeline.inference.drawing import (
    Drawn,
    GenerateOptions,
    Prompt,
    build_guide,
    draw_batch,
    plan,
    read_prompts,
)
from megabase.pipeline.inference.genome import identity
from megabase.pipeline.inference.model import LoadedModel, load_model, warn_of_context
from megabase.pipeline.inference.partial import Partial, check_beside, device_of_process, is_finished

SUFFIXES = (".fa", ".fasta", ".fna", ".faa")
LINE = 60
"""Letters of a line of the FASTA file."""


def run(options: GenerateOptions) -> int:
    """Generate sequences; returns the exit code.

    Raises:
        UserError, ConfigError: bad input; nothing was generated.
        RunError: the output cannot be written, or the model cannot continue.
    """
    check_options(options)
    if is_finished(options.output, options.portion):
        return 0
    check_beside(options.output, beside(options.output))
    loaded = load_model(options.model, options.step)
    prompts = read_prompts(options.prompts, loaded.alphabet)
    check_model(loaded, prompts, options)
    device = device_of_process()
    guide = build_guide(options, prompts, loaded.alphabet, device)
    batches = {f"{i:06d}.jsonl": rows for i, rows in enumerate(plan(prompts, options.number, options.batch))}
    sizes = {name: len(rows) * options.length for name, rows in batches.items()}
    partial = Partial.open(options.output, call_of(options, loaded), sizes, options.portion)
    loaded.model.to(device)
    todo = partial.todo()
    with bar("generating", sum(sizes[name] for name in todo), shown=sys.stderr.isatty()) as advance:
        for name in todo:
            add(partial, name, draw_batch(loaded, prompts, batches[name], guide, options, advance))
    if partial.is_complete() and partial.publish(
        (beside(options.output), lambda path: write_jsonl(path, partial)),
        (options.output, lambda path: write_fasta(path, partial)),
    ):
        report(options, loaded)
    return 0


def check_options(options: GenerateOptions) -> None:
    """Raise UserError for an option that cannot work with any model."""
    if options.output.suffix not in SUFFIXES:
        raise UserError(f"--output {options.output}: name a FASTA file, with one of {', '.join(SUFFIXES)}")
    for name in ("length", "number", "batch"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} {getattr(options, name)}: must be 1 or more")
    try:
        Sampling(options.temperature, options.top_k, None, options.top_p).validate(vocab_size=1)
    except ValueError as error:
        raise UserError(f"--{str(error).replace('top_', 'top-')}") from None


def check_model(loaded: LoadedModel, prompts: Sequence[Prompt], options: GenerateOptions) -> None:
    """Raise UserError or ConfigError if the model cannot generate; warn of contexts longer than trained."""
    if loaded.alphabet.name == "bytes":
        raise UserError(
            "the model's alphabet is 'bytes', and FASTA cannot hold every byte: generate from Python "
            "(megabase.models.generation.generate)"
        )
    start(loaded.model, 1)
    longest = max(len(prompt.letters) for prompt in prompts) + options.length
    loaded.model.body.config.validate(1 + longest)
    warn_of_context(loaded, longest, f"prompt and sequence have up to {longest:,} letters")


def call_of(options: GenerateOptions, loaded: LoadedModel) -> dict[str, Any]:
    """All that the sequences depend on."""
    given = {**asdict(options), "stop": list(options.stop), "forbid": list(options.forbid)}
    for name in ("output", "portion", "json", "step"):
        del given[name]
    prompts = None if options.prompts is None else identity(options.prompts)
    return given | {"model": asdict(loaded.source), "prompts": prompts}


def add(partial: Partial, task: str, drawn: Sequence[Drawn]) -> None:
    """Publish what a batch drew."""
    lines = [f"{json.dumps(asdict(each))}\n" for each in drawn]
    partial.add(task, lambda path: path.write_text("".join(lines)))


def beside(output: Path) -> Path:
    """The JSONL file beside the FASTA file."""
    return output.with_suffix(".jsonl")


def write_jsonl(path: Path, partial: Partial) -> None:
    """Write the lines of all tasks, without the letters. Raises OSError."""
    with path.open("w") as file:
        for each in finished(partial):
            del each["sequence"]
            file.write(f"{json.dumps(each)}\n")


def write_fasta(path: Path, partial: Partial) -> None:
    """Write the sequences of all tasks. Raises OSError."""
    with path.open("w") as file:
        for each in finished(partial):
            sequence = each["sequence"]
            lines = [sequence[i : i + LINE] for i in range(0, len(sequence), LINE)]
            file.write("\n".join([f">{each['name']}", *lines, ""]))


def finished(partial: Partial) -> Iterator[dict[str, Any]]:
    """What every task drew, sequence by sequence."""
    for name in partial.sizes:
        with partial.read(name).open() as file:
            yield from map(json.loads, file)


def report(options: GenerateOptions, loaded: LoadedModel) -> None:
    """Print the sums over all sequences, and where they come from."""
    nats, letters, sequences = 0.0, 0, 0
    with beside(options.output).open() as file:
        for each in map(json.loads, file):
            nats, letters, sequences = nats + each["nats"], letters + each["length"], sequences + 1
    summary = {
        "output": str(options.output),
        "jsonl": str(beside(options.output)),
        "model": asdict(loaded.source),
        "seed": options.seed,
        "sequences": sequences,
        "letters": letters,
        "nats": nats,
        "bits_per_letter": round(nats / letters / math.log(2), 6),
    }
    if options.json:
        print(json.dumps(summary))
    else:
        print(
            f"{options.output}: sequences: {sequences:,}, letters: {letters:,}; the model gives them "
            f"{summary['bits_per_letter']} bits per letter; {beside(options.output)} has the log-probability of each"
        )
