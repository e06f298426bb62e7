"""The command line: build the parser from the commands, run one of them, turn errors into one line and an exit code.

Exit codes: 0 done; 1 failed; 2 bad input (one line on stderr); 75 training stopped at a checkpoint and can go on;
130 interrupted. Importing this file imports no torch.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

import megabase
from megabase.pipeline import log
from megabase.pipeline.commands import (
    bench,
    cancel,
    checkpoints,
    data,
    doctor,
    embed,
    evaluate,
    export,
    finetune,
    generate,
    index,
    job_end,
    plan,
    prepare,
    report,
    score,
    status,
    submit,
    sync,
    train,
    variants,
    watch,
)
from megabase.pipeline.commands.settings import refuse_dashes
from megabase.pipeline.errors import RunError, UserError
from megabase.pipeline.ranks.stop import INTERRUPTED

logger = logging.getLogger("megabase.pipeline.cli")  # __name__ is __main__ under `python -m`

COMMANDS = {
    "prepare": prepare,
    "index": index,
    "data": data,
    "plan": plan,
    "train": train,
    "submit": submit,
    "status": status,
    "cancel": cancel,
    "watch": watch,
    "checkpoints": checkpoints,
    "report": report,
    "sync": sync,
    "export": export,
    "evaluate": evaluate,
    "score": score,
    "variants": variants,
    "embed": embed,
    "generate": generate,
    "finetune": finetune,
    "bench": bench,
    "doctor": doctor,
    "job-end": job_end,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. A rank of a training ends its process with that code instead."""
    log.set_up()
    try:
        code = _run(sys.argv[1:] if arguments is None else arguments)
    except Exception as error:
        if not _is_rank():
            raise
        _report(error)
        code = 1
    if _is_rank():
        from megabase.pipeline.ranks.failure import exit_rank

        exit_rank(code)
    return code


def build_parser() -> argparse.ArgumentParser:
    """The command line, as frozen by tests/pipeline/test_contract.py."""
    return _parsers()[0]


def _parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser of the command line, and that of each command."""
    parser = argparse.ArgumentParser(
        prog="megabase", description="Pretrain reversible Reformers on very long sequences."
    )
    parser.add_argument("--version", action="version", version=f"megabase {megabase.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        command.add(commands.add_parser(name, help=command.HELP))
    return parser, commands.choices


def _parse(words: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; options may stand before, between and after other words. Exits as argparse does.

    Raises:
        UserError: a setting is written as an option.
    """
    parser, commands = _parsers()
    name = next(iter(words), "")
    if (
        name not in commands or name == "bench"
    ):  # argparse cannot mix words and options before a further command
        return parser.parse_args(words)
    options, unknown = commands[name].parse_known_intermixed_args(words[1:], argparse.Namespace(command=name))
    if unknown and hasattr(options, "settings"):
        refuse_dashes(unknown, words)
    if unknown:
        commands[name].error(f"unrecognized arguments: {' '.join(unknown)}")
    return options


def _run(words: Sequence[str]) -> int:
    """Run a command and report an error that is the user's or the run's; returns the exit code."""
    try:
        options = _parse(words)
        return COMMANDS[options.command].run(options)
    except KeyboardInterrupt:
        if not _is_rank():  # the supervisor reports an interrupted rank
            logger.error("interrupted")
        return INTERRUPTED
    except RunError as error:
        _report(error)
        return 1
    except Exception as error:
        if not _is_bad_input(error):
            raise
        _report(error)
        return 2


def _is_bad_input(error: Exception) -> bool:
    if isinstance(error, UserError):
        return True
    # Imported here, because they import torch.
    from megabase.datamodules.errors import DataError
    from megabase.models.config import ConfigError

    return isinstance(error, DataError | ConfigError)


def _is_rank() -> bool:
    """Whether this process has joined a process group. Asked without importing torch."""
    rendezvous = sys.modules.get("megabase.pipeline.ranks.rendezvous")
    return rendezvous is not None and rendezvous.is_started()


def _report(error: Exception) -> None:
    """Log an error in one line; in a rank as `ranks.failure` does it, so that not every rank prints the same line."""
    if failure := sys.modules.get("megabase.pipeline.ranks.failure"):
        failure.report_failure(error)
    else:
        logger.error(" ".join(str(error).split()))


if __name__ == "__main__":
    sys.exit(main())
