"""`megabase variants`: the likelihood of sequences with the variants of a VCF, against that of the genome."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megabase.datamodules.prepare.portions import Portion
from megabase.datamodules.progress import bar
from megabase.models.chance import Seeds
from megabase.models.generation import check_length, start
from megabase.pipeline.errors import UserError
from megabase.pipeline.inference.genome import Genome, identity
from megabase.pipeline.inference.model import LoadedModel, load_model, warn_of_context
from megabase.pipeline.inference.partial import WHOLE, Partial, device_of_process, is_finished
from megabase.pipeline.inference.score import BOTH, STRANDS
from megabase.pipeline.inference.variants.calls import Calls, parse_renames, read_calls
from megabase.pipeline.inference.variants.columns import SKIPPED, columns, values
from megabase.pipeline.inference.variants.edits import Edit
from megabase.pipeline.inference.variants.null import Lengths, compare, random_edits
from megabase.pipeline.inference.variants.reading import Reader
from megabase.pipeline.inference.variants.tasks import Plan, Task
from megabase.pipeline.inference.variants.write import (
    PARQUET,
    Scores,
    check_fields,
    check_output,
    index_of,
    write_index,
    write_parquet,
    write_vcf,
)


@dataclass(frozen=True)
class VariantOptions:
    """The arguments of the command.

    Attributes:
        model: a run directory or an export.
        vcf: the variants, VCF or BCF.
        genome: FASTA file.
        output: the VCF or Parquet file to write.
        downstream: bases that are scored after a variant.
        context: bases that are read before a variant; None: all.
        strand: one of STRANDS.
        hash_seeds: with how many rotations of the hashes each variant is scored.
        null: with how many random variants each one is compared.
        seed: of the random variants.
        rename: texts for `parse_renames`.
        keep_going: skip variants that do not fit the genome.
        step: of the checkpoint; "best"; None: the newest intact one.
        block: bases that are read at a time.
        portion: of the tasks, for this process.
        json: print a summary as JSON.
    """

    model: Path
    vcf: Path
    genome: Path
    output: Path
    downstream: int = 1024
    context: int | None = None
    strand: str = BOTH
    hash_seeds: int = 1
    null: int = 0
    seed: int = 0
    rename: Sequence[str] = ()
    keep_going: bool = False
    step: int | str | None = None
    block: int = 1 << 14
    portion: Portion = WHOLE
    json: bool = False


def run(options: VariantOptions) -> int:
    """Score a VCF file; returns the exit code.

    Raises:
        UserError, DataError, ConfigError: bad input; nothing was scored.
        RunError: the output cannot be written.
    """
    check_output(options.output)
    if is_finished(options.output, options.portion):
        return 0
    genome = Genome(options.genome)
    calls = read_calls(options.vcf, genome, parse_renames(options.rename), keep_going=options.keep_going)
    wanted = columns(STRANDS[options.strand], options.hash_seeds, options.null)
    if not options.output.name.endswith(PARQUET):
        check_fields(calls, [*wanted, SKIPPED])
    edits = list(dict.fromkeys(one.edit for one in calls.alternates if one.edit))
    loaded = load_model(options.model, options.step)
    check(loaded, genome, edits, options)
    random = random_edits(genome, edits, options.null, options.seed)
    plan = plan_of(options, loaded, genome, [*edits, *(edit for of in random.values() for edit in of)])
    tasks = plan.tasks()
    sizes = {name: plan.size(task) for name, task in tasks.items()}
    partial = Partial.open(options.output, call_of(options, loaded, genome), sizes, options.portion)
    score(loaded, plan, tasks, options, partial)
    if not partial.is_complete():
        return 0

    # Read while the output is written: another process may write it at the same time, and remove the tasks.
    @functools.cache
    def scores() -> Scores:
        found = values(plan.collect(tasks, partial.read))
        if options.null:
            found |= compared(edits, random, found["llr"])
        place = {edit: number for number, edit in enumerate(edits)}
        rows = [place[one.edit] if one.edit else -1 for one in calls.alternates]
        return Scores(calls, rows, wanted, found, source_of(options, loaded))

    if publish(partial, calls, scores):
        report(options, loaded, scores())
    return 0


def compared(
    edits: Sequence[Edit], random: Mapping[Lengths, Sequence[Edit]], llr: NDArray[np.float64]
) -> dict[str, NDArray[np.float64]]:
    """The columns that compare edits with random ones. llr: (all,) of the edits, then of the random ones."""
    others = llr[len(edits) :].reshape(len(random), -1) if random else llr[:0]
    z, p = compare(edits, llr[: len(edits)], dict(zip(random, others, strict=True)))
    return {"llr_null_z": z, "llr_null_p": p}


def plan_of(options: VariantOptions, loaded: LoadedModel, genome: Genome, edits: Sequence[Edit]) -> Plan:
    """How the edits are scored."""
    strands = STRANDS[options.strand]
    return Plan(
        genome, loaded.alphabet, edits, strands, options.hash_seeds, options.context, options.downstream
    )


def check(loaded: LoadedModel, genome: Genome, edits: Sequence[Edit], options: VariantOptions) -> None:
    """Raise UserError or ConfigError if the model cannot score the edits; warn of contexts longer than trained."""
    if loaded.alphabet.complement is None:
        raise UserError(
            f"the model's alphabet is {loaded.alphabet.name!r}: take a model that was trained on dna"
        )
    if options.hash_seeds > 1 and not {"lsh", "performer"} & set(loaded.model.body.config.pattern):
        raise UserError(
            f"--hash-seeds {options.hash_seeds}: the model has no lsh or performer layers, so all rotations give the "
            "same: leave it out"
        )
    start(loaded.model, 1)
    contexts = [genome.lengths[edit.record] for edit in edits]
    if options.context is not None:
        contexts = [min(options.context, length) for length in contexts]
    longest, shorter = max(contexts, default=0), loaded.config.data.length - 1
    read = max(
        (c + max(len(e.bases), e.end - e.start) for c, e in zip(contexts, edits, strict=True)), default=0
    )
    check_length(loaded.model, 1 + read + options.downstream)
    what = f"up to {longest:,} bases are read before a variant"
    warn_of_context(loaded, longest, what, f"; --context {shorter} reads no more")


def call_of(options: VariantOptions, loaded: LoadedModel, genome: Genome) -> dict[str, Any]:
    """All that the results of the tasks depend on."""
    return {
        "model": asdict(loaded.source),
        "vcf": identity(options.vcf),
        "genome": genome.identity(),
        "rename": parse_renames(options.rename),
        "keep_going": options.keep_going,
        "downstream": options.downstream,
        "context": options.context,
        "strand": options.strand,
        "hash_seeds": options.hash_seeds,
        "null": options.null,
        "seed": options.seed,
        "block": options.block,
    }


def source_of(options: VariantOptions, loaded: LoadedModel) -> str:
    """What the scores come from, as one line."""
    context = "all" if options.context is None else options.context
    return (
        f"model={loaded.source.path} step={loaded.source.step} context={context} downstream={options.downstream} "
        f"strand={options.strand} hash_seeds={options.hash_seeds} null={options.null} seed={options.seed}"
    )


def score(
    loaded: LoadedModel, plan: Plan, tasks: Mapping[str, Task], options: VariantOptions, partial: Partial
) -> None:
    """Do the tasks of this process that are not finished."""
    loaded.model.to(device_of_process())
    todo = partial.todo()
    with bar("scoring", sum(partial.sizes[name] for name in todo), shown=sys.stderr.isatty()) as advance:
        for name in todo:
            seeds = Seeds(run=loaded.config.run.seed, step=tasks[name].rotation)
            reader = Reader(loaded.model, seeds, options.block, options.downstream)
            partial.add(name, functools.partial(np.save, arr=plan.run(tasks[name], reader, advance)))


def publish(partial: Partial, calls: Calls, scores: Callable[[], Scores]) -> bool:
    """Write the output, and the index of a VCF before it; returns whether this process wrote it."""
    output = partial.output
    if output.name.endswith(PARQUET):
        return partial.publish((output, lambda path: write_parquet(path, scores())))
    return partial.publish(
        (index_of(output, calls), lambda path: write_index(path, scores())),
        (output, lambda path: write_vcf(path, scores())),
    )


def report(options: VariantOptions, loaded: LoadedModel, scores: Scores) -> None:
    """Print how many ALTs were scored, and what they are on average."""
    skipped = scores.calls.skipped
    total = len(scores.calls.alternates)
    found = scores.values["llr"][[row for row in scores.rows if row >= 0]]
    summary = {
        "output": str(options.output),
        "model": asdict(loaded.source),
        "strand": options.strand,
        "context": options.context,
        "downstream": options.downstream,
        "hash_seeds": options.hash_seeds,
        "null": options.null,
        "seed": options.seed,
        "alternates": total,
        "scored": len(found),
        "skipped": skipped,
        "llr_mean": round(float(found.mean()), 6) if len(found) else None,
        "llr_median": round(float(np.median(found)), 6) if len(found) else None,
    }
    if options.json:
        print(json.dumps(summary))
        return
    left_out = f"; skipped: {', '.join(f'{n:,} {name}' for name, n in skipped.items())}" if skipped else ""
    print(
        f"{options.output}: median LLR {summary['llr_median']}; ALTs: {total:,}, scored: {len(found):,}{left_out}"
    )
