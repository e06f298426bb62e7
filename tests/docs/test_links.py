"""The pages name only what exists: links, files, modules, settings and commands."""

import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "examples").glob("*.md")),
]
FOLDERS = ("benchmarks", "configs", "datamodules", "docs", "examples", "models", "pipeline", "slurm", "tests")
# Where the pages have names that a reader replaces, such as `dist/megabase-X.Y.Z-...`, they are in capitals.
PATH = re.compile(rf"(?<![\w./-])((?:{'|'.join(FOLDERS)})/[\w./-]*[\w/])")
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
MODULE = re.compile(r"\bmegabase((?:\.[A-Za-z_]\w*)+)")
CODE = re.compile(r"^( *)```.*?^\1```", re.DOTALL | re.MULTILINE)


def test_pages_are_found():
    assert {"README.md", "CONTRIBUTING.md", "CHANGELOG.md", "settings.md"} <= {page.name for page in PAGES}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in LINK.findall(CODE.sub("", page.read_text())):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        linked = (page.parent / file).resolve() if file else page
        assert linked.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(linked), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_named_files_exist(page):
    for path in PATH.findall(page.read_text()):
        assert (ROOT / path).exists(), f"{page.name} names {path}"


def test_named_modules_can_be_imported():
    named = {name for page in PAGES for name in MODULE.findall(page.read_text())} - {".json"}  # the manifest
    assert len(named) > 20
    for name in sorted(named):
        assert imports(f"megabase{name}"), f"a page names megabase{name}"


def test_named_settings_exist():
    from megabase.pipeline.config.keys import dotted
    from megabase.pipeline.config.schema import RunConfig

    known = set(dotted(RunConfig())) | {"optim.learning_rate"}  # the unknown key of docs/troubleshooting.md
    known |= {
        f"trainer.{name}" for name in ("callback_metrics", "global_step", "should_stop")
    }  # Lightning's Trainer
    sections = {key.split(".")[0] for key in known} - {"model"}  # in Python code: a model and its attributes
    pattern = re.compile(rf"(?<![\w./-])((?:{'|'.join(sections)})\.[a-z_]+)\b(?!\()")
    for page in PAGES:
        for key in pattern.findall("\n".join(code_of(page))):
            assert key in known, f"{page.name} names the setting {key}"


def test_named_commands_exist():
    from megabase.pipeline.cli import build_parser

    known = set(re.findall(r"^    (\w+)", build_parser().format_help(), re.MULTILINE))
    assert {"train", "export"} <= known
    for page in PAGES:
        for command in re.findall(r"(?:^|[`$ ])megabase ([a-z]+)\b", "\n".join(code_of(page)), re.MULTILINE):
            assert command in known, f"{page.name} names megabase {command}"


def code_of(page: Path) -> Iterator[str]:
    """The code of a page: blocks, and what stands between backquotes."""
    text = page.read_text()
    yield from (block[0] for block in CODE.finditer(text))
    yield from re.findall(r"`[^`\n]+`", CODE.sub("", text))


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as both mkdocs and hosts of repositories make them."""
    headings = re.findall(r"^#+ (.+)$", CODE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def imports(name: str) -> bool:
    """Whether a dotted name is a module, or an attribute (of an attribute) of one."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False
