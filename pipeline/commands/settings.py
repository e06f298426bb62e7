"""What `train` and `submit` share: config files and KEY=VALUE settings on the command line."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from megabase.pipeline.errors import UserError

# What `--help` says of them. A test compares the names with the sections of the schema, whose import takes longer.
HELP_ON_SETTINGS = """\
settings are written SECTION.NAME=VALUE, such as data.length=8192. The sections:
  run         name and directory of the run, seed
  model       the Reformer: width, depth, layers, attention
  data        shards, length of a window, batch
  optim       learning rate, AdamW
  trainer     steps, nodes and ranks, precision, evaluation
  zero        DeepSpeed ZeRO: what is sharded and offloaded
  checkpoint  when checkpoints are written, which are kept
  guard       what happens at a bad loss
  tracking    MLflow
  slurm       what a job requests

Files and settings are merged from left to right. docs/settings.md documents every setting with its type and default;
configs/ has complete files for real sizes.
"""


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Declare `CONFIG... [KEY=VALUE...]`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = HELP_ON_SETTINGS
    parser.add_argument("settings", nargs="+", metavar="CONFIG | KEY=VALUE", help="YAML files, then settings")


def split_settings(settings: Sequence[str]) -> tuple[list[str], list[str]]:
    """(config files, KEY=VALUE settings): a word with '=' that names no existing file is a setting."""
    files = [word for word in settings if "=" not in word or _exists(word)]
    return files, [word for word in settings if word not in files]


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except OSError:  # a long value is not the name of a file
        return False


def refuse_dashes(unknown: Sequence[str], words: Sequence[str]) -> None:
    """Raise UserError for a setting that is written as an option, such as `--data.length 512`, and say how to write it.

    Args:
        unknown: the words of the command line that the command does not know.
        words: all words.
    """
    from megabase.pipeline.config.names import closest  # imports the schema

    for word in unknown:
        if not word.startswith("--"):
            continue
        name, equals, value = word.removeprefix("--").partition("=")
        if not equals:
            value = next(iter(words[words.index(word) + 1 :]), "VALUE")
        if value.startswith("--") or "=" in value:
            value = "VALUE"  # the next word is not the value
        if keys := closest(name.replace("-", "_")):
            written = " or ".join(f"{key}={value}" for key in keys)
            raise UserError(f"{word}: settings are written without dashes: {written}")
