"""`trainer.callbacks`: what an entry may be. `training/user_callbacks.py` imports the classes, in the ranks."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from megabase.pipeline.errors import UserError

CLASS, ARGUMENTS = "class", "arguments"
_FORMS = "give package.module.Class, or {class: package.module.Class, arguments: {name: value}}"


def parse(entries: list[Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(import path of the class, arguments by name) of each entry. Raises UserError for one of another form."""
    for number, entry in enumerate(entries):
        path = entry.get(CLASS) if isinstance(entry, dict) else entry
        if not isinstance(path, str) or not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)+", path):
            raise UserError(f"trainer.callbacks[{number}]={entry!r}: {_FORMS}")
        arguments = entry.get(ARGUMENTS) or {} if isinstance(entry, dict) else {}
        unknown = set(entry) - {CLASS, ARGUMENTS} if isinstance(entry, dict) else set()
        if unknown or not isinstance(arguments, dict) or not all(isinstance(name, str) for name in arguments):
            raise UserError(f"trainer.callbacks[{number}]={entry!r}: {_FORMS}")
        yield path, arguments


def check_modules(entries: list[Any]) -> None:
    """Raise UserError unless the package of each callback can be found. Imports nothing."""
    for path, _ in parse(entries):
        package, found = path.partition(".")[0], None
        with working_directory_on_path(), suppress(ValueError):  # of __main__, which is no file of theirs
            found = importlib.util.find_spec(package)
        if found is None:
            raise UserError(
                f"trainer.callbacks: {path}: no module is named {package!r}, neither in {Path.cwd()} nor in the Python"
                " environment"
            )


@contextmanager
def working_directory_on_path() -> Iterator[None]:
    """Also find modules in the working directory. `megabase` itself keeps it off the module path."""
    here = str(Path.cwd())
    sys.path.append(here)  # at the end: it must not hide a library
    try:
        yield
    finally:  # not the last entry, if a module has added its own
        del sys.path[len(sys.path) - 1 - sys.path[::-1].index(here)]
