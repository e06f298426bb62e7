"""Limits that keep the code readable: no file over 400 lines, and no function over 60 without a stated reason."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("models", "datamodules", "pipeline", "slurm")
MOST_LINES_OF_A_FILE = 400
MOST_LINES_OF_A_FUNCTION = 60
# How a docstring gives the reason for a longer one.
REASON = "Long because"

Function = ast.FunctionDef | ast.AsyncFunctionDef


def sources() -> Iterator[Path]:
    """Every Python file of the packages."""
    for package in PACKAGES:
        yield from sorted((ROOT / package).rglob("*.py"))


def lines_of(function: Function) -> int:
    """Lines of a function from `def` to its end, without its docstring."""
    assert function.end_lineno is not None
    total = function.end_lineno - function.lineno + 1
    first = function.body[0]
    if ast.get_docstring(function) is not None:
        assert first.end_lineno is not None
        total -= first.end_lineno - first.lineno + 1
    return total


def too_long(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """(name, lines) of each function that is over the limit and gives no reason."""
    for node in ast.walk(tree):
        if isinstance(node, Function):
            lines = lines_of(node)
            if lines > MOST_LINES_OF_A_FUNCTION and REASON not in (ast.get_docstring(node) or ""):
                yield node.name, lines


def test_files_are_short() -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in sources()}
    long = {str(path.relative_to(ROOT)): n for path, n in lengths.items() if n > MOST_LINES_OF_A_FILE}
    assert not long, f"split these files: {long}"


def test_functions_are_short_or_say_why_not() -> None:
    long = [
        f"{path.relative_to(ROOT)}: {name} has {lines} lines"
        for path in sources()
        for name, lines in too_long(ast.parse(path.read_text()))
    ]
    assert not long, "\n".join(["cut these functions, or say in the docstring: Long because ...", *long])


def test_a_long_function_is_found() -> None:
    body = "\n".join("    x = 1" for _ in range(MOST_LINES_OF_A_FUNCTION))
    assert list(too_long(ast.parse(f"def f():\n{body}"))) == [("f", MOST_LINES_OF_A_FUNCTION + 1)]
    assert not list(too_long(ast.parse(f'def f():\n    """Long because x."""\n{body}')))


def test_every_package_says_what_it_is_for() -> None:
    folders = {path.parent for path in sources()}
    silent = [
        str(folder.relative_to(ROOT))
        for folder in sorted(folders)
        if not (folder / "__init__.py").exists()
        or not ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))
    ]
    assert not silent, f"without a docstring in __init__.py: {silent}"
