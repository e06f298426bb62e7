"""The commands. Thin: each parses its arguments and calls one function.

Exit codes: 0 done, 1 failed, 2 something given is wrong (one line on stderr), 75 stopped at a checkpoint: start again.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megabase.pipeline import log
from megabase.pipeline.errors import RESUME_HINT, RunError, UserError
from megabase.pipeline.ranks.stop import INTERRUPTED

if TYPE_CHECKING:
    from megabase.datamodules.index.shard_index import ShardIndex

logger = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. A rank of a training ends its process with it instead."""
    options = build_parser().parse_args(arguments)
    log.set_up()
    try:
        code = _outcome(options)
    except Exception as error:
        if not _is_rank():
            raise
        _complain(error)
        code = 1
    if _is_rank():
        from megabase.pipeline.ranks.failure import exit_rank

        exit_rank(code)
    return code


def _outcome(options: argparse.Namespace) -> int:
    """Run a command; returns the exit code, after the message that goes with it."""
    try:
        return int(options.run(options))
    except KeyboardInterrupt:
        if not _is_rank():  # whose supervisor says so
            logger.error("interrupted%s", f"; {RESUME_HINT}" if options.command == "train" else "")
        return INTERRUPTED
    except RunError as error:
        _complain(error)
        return 1
    except UserError as error:
        _complain(error)
        return 2
    except Exception as error:
        if not _is_the_users(error):
            raise
        _complain(error)
        return 2


def build_parser() -> argparse.ArgumentParser:
    """The command line, as frozen by tests/pipeline/test_contract.py."""
    parser = argparse.ArgumentParser(
        prog="megabase", description="Pretrain reversible Reformers on very long sequences."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    prepare = commands.add_parser("prepare", help="sequence files to WebDataset shards with an index")
    prepare.add_argument(
        "inputs",
        nargs="*",
        metavar="INPUT",
        help="FASTA, FASTQ, JSONL, or text with --alphabet bytes; plain, gzip, bgzip or zstd; globs",
    )
    prepare.add_argument("output", metavar="OUTPUT", help="directory of shards to make")
    _add_splits(prepare)
    prepare.add_argument("--field", metavar="NAME", default="text", help="of a JSONL line (default: text)")
    prepare.add_argument("--jobs", type=int, metavar="N", help="processes (default: one per CPU)")
    prepare.add_argument(
        "--check", action="store_true", help="verify the shards OUTPUT against their checksums"
    )
    prepare.set_defaults(run=_prepare)

    index = commands.add_parser("index", help="an index beside the tars that others wrote")
    index.add_argument("directory", metavar="DIR", help="of *.tar with .seq, .txt, .fasta or .npy members")
    _add_splits(index)
    index.set_defaults(run=_index)

    data = commands.add_parser("data", help="what is in a shard set")
    data.add_argument("directory", metavar="INDEX", help="directory or URL of the shards")
    data.add_argument("--json", action="store_true", help="as JSON")
    data.add_argument(
        "--picture", type=Path, metavar="FILE.png", help="base composition and runs of N, drawn"
    )
    data.set_defaults(run=_data)

    for name, text, function in (
        ("train", "train, or resume, the run that a config describes", _train),
        ("submit", "train on a SLURM cluster", _submit),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument(
            "settings", nargs="+", metavar="CONFIG | KEY=VALUE", help="YAML files, then settings"
        )
        if name == "submit":
            command.add_argument("--dry-run", action="store_true", help="show the sbatch call only")
        command.set_defaults(run=function)

    checkpoints = commands.add_parser("checkpoints", help="a run's checkpoints, and whether they are whole")
    checkpoints.add_argument("directory", metavar="RUN", help="run directory; it may be training")
    checkpoints.add_argument("--json", action="store_true", help="as JSON")
    checkpoints.add_argument("--fast", action="store_true", help="compare names and sizes, not every byte")
    checkpoints.set_defaults(run=_checkpoints)

    _add_export(commands)
    _add_bench(commands.add_parser("bench", help="time and memory against the peers, on this machine"))
    return parser


def _add_export(commands: Any) -> None:
    """`export`."""
    export = commands.add_parser(
        "export",
        help="a run's weights as one file",
        description="Write the weights of a run's newest checkpoint that verifies as one model, without ranks or"
        " DeepSpeed. The run may be training. Load it with megabase.models.pretrained.from_pretrained(OUT).",
    )
    export.add_argument("directory", metavar="RUN", help="run directory: <run.root>/<run.name>")
    export.add_argument("output", metavar="OUT", type=Path, help="directory to make; complete, or not there")
    export.add_argument(
        "--format",
        choices=["safetensors", "huggingface"],
        default="safetensors",
        help="safetensors (the default): in pieces, in little memory; huggingface: for transformers, where the"
        " model maps; takes memory for three of the model",
    )
    export.add_argument("--step", type=int, metavar="N", help="of another checkpoint than the newest")
    export.add_argument(
        "--dtype", choices=["fp32", "bf16"], default="fp32", help="of the weights there (default: fp32)"
    )
    export.set_defaults(run=_export)


def _add_splits(command: argparse.ArgumentParser) -> None:
    """What `prepare` and `index` share."""
    command.add_argument(
        "--alphabet", choices=["dna", "protein", "bytes"], default="dna", help="bytes for text"
    )
    command.add_argument(
        "--valid", metavar="X", help="validation: a fraction of each record, or record names a,b"
    )
    command.add_argument("--test", metavar="X", help="test: likewise")
    command.add_argument(
        "--intervals", type=Path, metavar="BED", help="chr, start, end, split: instead of --valid and --test"
    )


def _add_bench(bench: argparse.ArgumentParser) -> None:
    """`bench attention` and `bench model`."""
    benchmarks = bench.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    attention = benchmarks.add_parser("attention", help="one attention layer's core, forward and backward")
    attention.add_argument(
        "--lengths",
        metavar="L,L",
        default="1k,2k,4k,8k,16k,32k,64k,128k,256k,512k,1M",
        help="tokens (default: %(default)s, each contestant as far as time and memory allow)",
    )
    attention.add_argument("--contestants", metavar="A,B", help="default: ours and every peer")
    attention.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], help="default: fp32; bf16 on a GPU")
    attention.add_argument("--heads", type=int, metavar="N", help="default: 4; 8 on a GPU")
    attention.add_argument("--head-dim", type=int, metavar="N", help="default: 64; 128 on a GPU")
    attention.add_argument("--chunk", type=int, metavar="N", help="positions; default: 64; 128 on a GPU")
    attention.add_argument("--rounds", type=int, metavar="N", default=4, help="of hashing (default: 4)")
    attention.set_defaults(run=_bench_attention)

    model = benchmarks.add_parser("model", help="one training step; memory against length and depth")
    model.add_argument(
        "--lengths", metavar="L,L", default="2k,4k,8k,16k", help="tokens (default: %(default)s)"
    )
    model.add_argument(
        "--depths",
        metavar="D,D",
        default="2,6,12,24,48",
        help="layers, for memory at the shortest length; 0: none (default: %(default)s)",
    )
    model.add_argument("--contestants", metavar="A,B", help="default: ours and every peer")
    model.add_argument(
        "--dtype", choices=["fp32", "bf16"], default="fp32", help="of weights and computation (default: fp32)"
    )
    for name, value in (("dim", 256), ("depth", 6), ("heads", 4), ("chunk", 64), ("rounds", 4)):
        model.add_argument(f"--{name}", type=int, metavar="N", default=value, help="default: %(default)s")
    model.add_argument(
        "--longest", action="store_true", help="then double the length until a step no longer fits"
    )
    model.set_defaults(run=_bench_model)

    data = benchmarks.add_parser(
        "data", help="a loader's tokens a second, and its first batch after a resume"
    )
    data.add_argument("--lengths", metavar="L,L", default="8k,128k", help="bases (default: %(default)s)")
    data.add_argument("--contestants", metavar="A,B", help="default: ours and every peer")
    data.add_argument(
        "--mebibytes", type=int, metavar="N", default=64, help="of records, for each length (default: 64)"
    )
    data.add_argument(
        "--directory", type=Path, metavar="DIR", help="where they are made (default: a temporary one)"
    )
    data.set_defaults(run=_bench_data)

    for command in (attention, model):
        command.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    for command in (attention, model, data):
        command.add_argument(
            "--repeat", type=int, metavar="N", default=7, help="timed calls at most (default: 7)"
        )
        command.add_argument(
            "--seconds",
            type=float,
            metavar="S",
            help="what a call may take, else it is left out (default: 40 to 60; 5 on a GPU)",
        )
        command.add_argument(
            "--json", type=Path, metavar="FILE", help="write every sample, and a picture beside"
        )
        command.add_argument("--picture", type=Path, metavar="FILE.png", help="write the picture here")


def split_settings(settings: Sequence[str]) -> tuple[list[str], list[str]]:
    """(config files, KEY=VALUE arguments): an argument with '=' that is no existing file is a setting."""
    files = [s for s in settings if "=" not in s or Path(s).exists()]
    return files, [s for s in settings if s not in files]


def _prepare(options: argparse.Namespace) -> int:
    from megabase.datamodules.prepare.check import check
    from megabase.datamodules.prepare.run import prepare

    shown = sys.stderr.isatty()
    if options.check:
        if options.inputs:
            raise UserError(
                f"prepare --check {options.inputs[0]} ...: give one directory of shards, no inputs"
            )
        if any(_splits(options)[name] is not None for name in ("valid", "test", "intervals")):
            raise UserError("prepare --check compares shards with their checksums: give no splits with it")
        bases = check(options.output, jobs=options.jobs, progress=shown)
        print(f"{options.output}: {bases:,} bases as they were written")
        return 0
    if not options.inputs:
        raise UserError(
            f"prepare {options.output}: give INPUT... and then OUTPUT, a new directory for shards"
        )
    splits = _splits(options)
    index = prepare(
        options.inputs, options.output, jobs=options.jobs, field=options.field, progress=shown, **splits
    )
    _print_splits(options.output, index)
    return 0


def _index(options: argparse.Namespace) -> int:
    from megabase.datamodules.prepare.foreign import index_tars

    index = index_tars(Path(options.directory), progress=sys.stderr.isatty(), **_splits(options))
    _print_splits(options.directory, index)
    return 0


def _data(options: argparse.Namespace) -> int:
    from megabase.datamodules.index.shard_index import ShardIndex
    from megabase.datamodules.report import description as report

    index = ShardIndex.open(options.directory)
    description = report.describe(index)
    if options.picture:
        report.draw(index, options.picture)
    print(json.dumps(description.as_dict(), indent=2) if options.json else report.text(description))
    return 0


def _splits(options: argparse.Namespace) -> dict[str, Any]:
    """What `_add_splits` added."""
    return {name: getattr(options, name) for name in ("alphabet", "valid", "test", "intervals")}


def _print_splits(directory: str, index: ShardIndex) -> None:
    segments = index.segments
    records = len(set(segments.record))
    print(f"{directory}: {records:,} records in {len(index.sizes)} shards")
    for split in segments.splits():
        total = int(segments.length[segments.rows_of(split)].sum())
        print(
            f"  {split:5} {total:>15,} bases, {total - segments.letters_of(split):,} of them outside the alphabet"
        )


def _train(options: argparse.Namespace) -> int:
    from megabase.pipeline.ranks.stop import StopRequest

    stop = StopRequest().listen()  # before the seconds of importing torch, in which a signal may come
    from megabase.pipeline.config.load import load
    from megabase.pipeline.training import run as train

    files, overrides = split_settings(options.settings)
    return train.train(load(files, overrides), options.settings, stop)


def _submit(options: argparse.Namespace) -> int:
    from megabase.pipeline.config.load import load
    from megabase.pipeline.slurm import submit

    files, overrides = split_settings(options.settings)
    return submit.submit_run(load(files, overrides), files, overrides, dry_run=options.dry_run)


def _checkpoints(options: argparse.Namespace) -> int:
    from megabase.pipeline.checkpoint import listing

    run = Path(options.directory)
    entries = listing.list_run(run, fast=options.fast, progress=sys.stderr.isatty())
    print(listing.as_json(run, entries) if options.json else listing.text(run, entries))
    return 0


def _export(options: argparse.Namespace) -> int:
    from megabase.pipeline.inference.export import export

    checkpoint = export(
        Path(options.directory),
        options.output,
        form=options.format,
        step=options.step,
        dtype=options.dtype,
    )
    print(f"{options.output}: the weights of {checkpoint}")
    return 0


def _bench_attention(options: argparse.Namespace) -> int:
    from megabase.pipeline.bench import attention

    return attention.run(attention.AttentionOptions(**_typed(options)))


def _bench_model(options: argparse.Namespace) -> int:
    from megabase.pipeline.bench import model

    return model.run(model.ModelOptions(**_typed(options)))


def _bench_data(options: argparse.Namespace) -> int:
    from megabase.pipeline.bench import data

    return data.run(data.DataOptions(**_typed(options)))


def _typed(options: argparse.Namespace) -> dict[str, Any]:
    """The options of a benchmark, without what argparse adds."""
    return {
        name: value for name, value in vars(options).items() if name not in ("command", "benchmark", "run")
    }


def _is_rank() -> bool:
    rendezvous = sys.modules.get("megabase.pipeline.ranks.rendezvous")  # it imports torch
    return rendezvous is not None and rendezvous.is_started()


def _is_the_users(error: Exception) -> bool:
    # Not at the head of the file: they bring torch along, and signals must be listened to before that.
    from megabase.datamodules.errors import DataError
    from megabase.models.config import ConfigError

    return isinstance(error, DataError | ConfigError)


def _complain(error: Exception) -> None:
    if failure := sys.modules.get("megabase.pipeline.ranks.failure"):  # it knows of other ranks
        failure.report_failure(error)
    else:
        logger.error(" ".join(str(error).split()))


if __name__ == "__main__":
    sys.exit(main())
