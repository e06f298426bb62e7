"""Tables on stdout: drawn by rich on a terminal; plain aligned text in a pipe or file, each row one line for grep."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

# Two spaces between columns, and nothing else.
PLAIN: dict[str, Any] = {"box": None, "pad_edge": False, "padding": (0, 2, 0, 0)}
# Columns of characters, more than any row has, so that rich wraps nothing.
_UNLIMITED = 100_000


def new_table(headings: Sequence[str] = (), *, left: Sequence[str] = ()) -> Table:
    """An empty table with these columns; numbers align to the right, the columns named in `left` to the left."""
    style = {"box": box.SIMPLE_HEAD} if sys.stdout.isatty() else PLAIN
    table = Table(**style)
    for heading in headings:
        table.add_column(heading, justify="left" if heading in left else "right", overflow="fold")
    return table


def show(*parts: Table | str) -> None:
    """Print tables and lines of text to stdout."""
    for part in parts:
        if isinstance(part, str):
            print(part)
        elif sys.stdout.isatty():
            Console(markup=False, highlight=False).print(part)
        else:
            print(as_text(part))


def as_text(table: Table) -> str:
    """A table as plain lines as long as they need to be, without spaces at their ends."""
    output = io.StringIO()
    Console(file=output, width=_UNLIMITED, markup=False, highlight=False).print(table)
    return "\n".join(line.rstrip() for line in output.getvalue().rstrip("\n").split("\n"))
