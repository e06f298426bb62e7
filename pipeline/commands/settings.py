"""What `train` and `submit` share: config files and KEY=VALUE settings on the command line."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Declare `CONFIG... [KEY=VALUE...]`."""
    parser.add_argument("settings", nargs="+", metavar="CONFIG | KEY=VALUE", help="YAML files, then settings")


def split_settings(settings: Sequence[str]) -> tuple[list[str], list[str]]:
    """(config files, KEY=VALUE settings): a word with '=' that names no existing file is a setting."""
    files = [word for word in settings if "=" not in word or Path(word).exists()]
    return files, [word for word in settings if word not in files]
