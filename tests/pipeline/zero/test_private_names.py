"""The list of private names: complete, not too long, and true for the installed versions."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from megabase.pipeline.zero.private_names import PRIVATE_NAMES, PrivateName

ROOT = Path(__file__).parents[3]
PACKAGES = ("pipeline", "models", "datamodules")
ZERO = ROOT / "pipeline" / "zero"
LIBRARIES = ("deepspeed", "pytorch_lightning", "lightning_fabric", "torch")
# Names that begin with an underscore, but are documented by Python.
DOCUMENTED = {"_exit", "_replace", "_make", "_asdict", "_fields"}
# Modules of the libraries whose names their documentation promises. Every other module is internal.
PUBLIC_MODULES = {
    "deepspeed",
    "lightning_fabric.plugins.environments",
    "pytorch_lightning",
    "pytorch_lightning.callbacks",
    "pytorch_lightning.strategies",
}
LISTED = {entry.name for entry in PRIVATE_NAMES}
# Listed names that other packages may use: they are also names of megabase's own attributes or of another library's.
AMBIGUOUS = {"overflow", "checkpoint_engine", "epoch_loop", "groups", "logger", "_config"}


def owner_of(dotted: str) -> Any:
    """The module or class of a dotted name."""
    parts = dotted.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            found = getattr(found, part)
        return found
    raise ModuleNotFoundError(dotted)


@cache
def names_in(source: str) -> set[str]:
    """Every attribute, variable, definition, argument, keyword and string constant in a source."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Attribute(attr=name) | ast.Name(id=name) | ast.arg(arg=name):
                names.add(name)
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.alias(name=name):
                names.add(name)
            case ast.keyword(arg=str(name)) | ast.Constant(value=str(name)):
                names.add(name)
    return names


@pytest.mark.parametrize("entry", PRIVATE_NAMES, ids=lambda entry: f"{entry.owner}.{entry.name}")
def test_the_installed_version_has_it(entry: PrivateName) -> None:
    owner = owner_of(entry.owner)
    if hasattr(owner, entry.name):
        return
    # An attribute that is set on instances, or on objects of another class, is in the source only.
    source = inspect.getsource(owner if isinstance(owner, ModuleType) else inspect.getmodule(owner) or owner)
    assert entry.name in names_in(source), f"{entry.owner} has no {entry.name} any more: {entry.reason}"


def test_every_listed_name_is_used_and_has_a_reason() -> None:
    used = set()
    for path in ZERO.glob("*.py"):
        if path.name != "private_names.py":
            used |= names_in(path.read_text())
    assert sorted(LISTED - used - {"epoch_loop"}) == []
    assert all(entry.reason and entry.owner.split(".")[0] in LIBRARIES for entry in PRIVATE_NAMES)
    pairs = [(entry.owner, entry.name) for entry in PRIVATE_NAMES]
    assert len(set(pairs)) == len(pairs)


def foreign_private_names(path: Path) -> Iterator[tuple[int, str]]:
    """(line, name) of what a file uses of the libraries and they do not promise.

    Private attributes of anything but `self` and `cls` that the file does not define itself; names from internal
    modules of DeepSpeed and Lightning; private names imported from anywhere but megabase.
    """
    tree = ast.parse(path.read_text())
    defined = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)} | {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls", "ctx")
            if not own and node.attr not in defined:
                yield node.lineno, node.attr
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] != "megabase":
            library = node.module.split(".")[0]
            internal = library in LIBRARIES and library != "torch" and node.module not in PUBLIC_MODULES
            yield from (
                (node.lineno, alias.name) for alias in node.names if internal or is_private(alias.name)
            )


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in DOCUMENTED


def sources() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def test_zero_uses_no_private_name_that_is_not_listed() -> None:
    unlisted = [
        f"{path.name}:{line}: {name}"
        for path in ZERO.glob("*.py")
        for line, name in foreign_private_names(path)
        if name not in LISTED
    ]
    assert unlisted == []


def test_no_other_package_uses_a_private_name() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in sources()
        if ZERO not in path.parents
        for line, name in foreign_private_names(path)
    ]
    assert found == []


@pytest.mark.slow
def test_no_other_package_uses_a_listed_name() -> None:
    found = []
    for path in sources():
        if ZERO in path.parents:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            name = ""
            if isinstance(node, ast.Attribute) and not is_private(node.attr):  # those are tested above
                name = node.attr
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):  # as for getattr
                name = node.value
            if name in LISTED - AMBIGUOUS:
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {name}")
    assert found == []
