"""What the scripts in benchmarks/ import exists. They run too long for a test, and mypy does not check them."""

import ast
import importlib
from importlib.util import find_spec
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def exists(module: str, name: str) -> bool:
    """Whether `from module import name` works."""
    return hasattr(importlib.import_module(module), name) or find_spec(f"{module}.{name}") is not None


@pytest.mark.parametrize("script", sorted(BENCHMARKS.glob("*.py")), ids=lambda path: path.stem)
def test_the_names_that_a_script_imports_exist(script: Path) -> None:
    if script.stem == "gpu_tiles":
        pytest.importorskip("triton")
    missing = [
        f"{node.module}.{alias.name}"
        for node in ast.walk(ast.parse(script.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(("megabase.", "tests."))
        for alias in node.names
        if not exists(str(node.module), alias.name)
    ]
    assert not missing
