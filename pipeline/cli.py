"""The commands. Thin: each parses its arguments and calls one function.

Exit codes: 0 done, 1 failed, 2 something given is wrong (one line on stderr), 75 stopped at a checkpoint: start again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.errors import RunError, UserError, rank_zero


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    options = build_parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except KeyboardInterrupt:
        return 130
    except RunError as error:
        _complain(error)
        return 1
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

    prepare = commands.add_parser("prepare", help="FASTA or text to WebDataset shards with an index")
    prepare.add_argument(
        "inputs", nargs="+", metavar="INPUT", help="FASTA (plain or gzip), or text with bytes"
    )
    prepare.add_argument("output", metavar="OUTPUT", help="directory of shards to make")
    prepare.add_argument(
        "--alphabet", choices=["dna", "protein", "bytes"], default="dna", help="bytes for text"
    )
    prepare.add_argument(
        "--valid", metavar="X", help="validation: a fraction of each record, or record names a,b"
    )
    prepare.add_argument("--test", metavar="X", help="test: likewise")
    prepare.set_defaults(run=_prepare)

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
    return parser


def split_settings(settings: Sequence[str]) -> tuple[list[str], list[str]]:
    """(config files, KEY=VALUE arguments): an argument with '=' that is no existing file is a setting."""
    files = [s for s in settings if "=" not in s or Path(s).exists()]
    return files, [s for s in settings if s not in files]


def _prepare(options: argparse.Namespace) -> int:
    from datamodules.prepare import prepare

    index = prepare(
        [Path(path) for path in options.inputs],
        Path(options.output),
        alphabet=options.alphabet,
        valid=options.valid,
        test=options.test,
        progress=sys.stderr.isatty(),
    )
    segments = index.segments
    records = len(set(segments.record))
    print(f"{options.output}: {records:,} records in {len(index.sizes)} shards")
    for split in segments.splits():
        rows = segments.rows_of(split)
        letters = sum(int(segments.length[row]) - segments.gap_length(row) for row in rows)
        total = int(segments.length[rows].sum())
        print(f"  {split:5} {total:>15,} letters, {total - letters:,} of them outside the alphabet")
    return 0


def _train(options: argparse.Namespace) -> int:
    from pipeline.preemption import StopRequest

    stop = StopRequest().listen()  # before the seconds of importing torch, in which a signal may come
    from pipeline import config, train

    files, overrides = split_settings(options.settings)
    return train.train(config.load(files, overrides), options.settings, stop)


def _submit(options: argparse.Namespace) -> int:
    from pipeline import config, submit

    files, overrides = split_settings(options.settings)
    return submit.submit_run(config.load(files, overrides), files, overrides, dry_run=options.dry_run)


def _is_the_users(error: Exception) -> bool:
    # Not at the head of the file: they bring torch along, and signals must be listened to before that.
    from datamodules.errors import DataError
    from models.config import ConfigError

    return isinstance(error, UserError | DataError | ConfigError)


def _complain(error: Exception) -> None:
    # Every rank finds the same thing wrong; one says so.
    if rank_zero():
        print(f"megabase: {' '.join(str(error).split())}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
