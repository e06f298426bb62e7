"""Every message on the page of symptoms, and in the examples of other pages, is one that the code can still print."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "troubleshooting.md"
# A text in the code with fewer characters than this, values left out, says too little to recognize a message by.
RECOGNIZED = 10
# Shorter pieces between two values, such as ": ", are found in any message.
PIECE = 6
# The part of a message that must come from texts in the code; the rest is values, such as paths and settings.
COVERED = 0.28
LIBRARIES = ("could not be converted to Integer",)  # OmegaConf's words


def messages() -> list[str]:
    """The messages on the page of symptoms, and those in code blocks of the other pages. Each is one line."""
    lines = lines_of_code(PAGE)
    for page in sorted(PAGE.parent.glob("*.md")):
        if page != PAGE:
            lines += [line for line in lines_of_code(page) if line.startswith("megabase: ")]
    return [line for line in lines if line and not line.endswith(LIBRARIES)]


def lines_of_code(page: Path) -> list[str]:
    """The lines of a page's code blocks."""
    blocks = re.findall(r"^```\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    return [line for block in blocks for line in block.splitlines()]


def texts(tree: ast.AST) -> Iterator[list[str]]:
    """Every string in the code that is not a docstring: its constant parts, between which there are values."""
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = [""]
            for value in node.values:
                if isinstance(value, ast.Constant):
                    parts[-1] += str(value.value)
                else:
                    parts.append("")
            yield parts
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield re.split(r"%[srd]", node.value)  # values of a message that is logged


@cache
def patterns() -> list[tuple[list[str], re.Pattern[str]]]:
    """The constant parts of every text in the code, and what finds them in this order."""
    found = {}
    for folder in ("datamodules", "models", "pipeline"):
        for file in (ROOT / folder).rglob("*.py"):
            for parts in texts(ast.parse(file.read_text())):
                if RECOGNIZED <= sum(map(len, parts)) <= 500:
                    found[".*?".join(f"({re.escape(part)})" for part in parts)] = parts
    return [(parts, re.compile(pattern)) for pattern, parts in sorted(found.items())]


def covered(message: str) -> float:
    """The fraction of a message's characters that come from texts in the code."""
    characters = set()
    for parts, pattern in patterns():
        # A search takes long where many parts are found and one is not.
        if all(part in message for part in parts) and (match := pattern.search(message)):
            for group in range(1, len(match.regs)):
                if len(match[group]) >= PIECE:
                    characters.update(range(*match.span(group)))
    return len(characters) / len(message)


def test_there_are_many_symptoms():
    headings = re.findall(r"^### ", PAGE.read_text(), re.MULTILINE)
    assert len(headings) >= 20
    assert len(messages()) >= 20


@pytest.mark.parametrize("message", messages())
def test_message_is_one_of_the_code(message):
    assert covered(message) >= COVERED, f"the docs have a message that the code no longer prints: {message}"


def test_other_texts_are_recognized_as_such():
    assert covered("megabase: the flux capacitor of rank 3 is empty: fill it with plutonium") < COVERED
