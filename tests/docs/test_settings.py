"""docs/settings.md has every setting, as the dataclasses have it now."""

import dataclasses
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.fixture(scope="module")
def settings() -> ModuleType:
    spec = importlib.util.spec_from_file_location("settings_page", DOCS / "settings.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_page_is_up_to_date(settings):
    assert (DOCS / "settings.md").read_text() == settings.page(), (
        "docs/settings.md is out of date: run `python docs/settings.py`"
    )


def test_page_names_every_key(settings):
    from megabase.pipeline.config.keys import dotted
    from megabase.pipeline.config.schema import RunConfig

    text = settings.page()
    for key in dotted(RunConfig()):
        assert f"| `{key}` |" in text


def test_undocumented_setting_is_an_error(settings):
    @dataclasses.dataclass
    class Undocumented:
        """A class that documents only one of its settings.

        Attributes:
            first: Documented, and
                over two lines.
        """

        first: int = 1
        second: int | None = None

    assert settings.documented(Undocumented) == (
        "A class that documents only one of its settings.",
        {"first": "Documented, and over two lines."},
    )
    with pytest.raises(KeyError, match="second"):
        settings.section(Undocumented, "x")


def test_types_and_defaults_are_written_as_in_yaml(settings):
    assert settings.type_name(int | None) == "int or null"
    assert settings.type_name(list[str]) == "list of str"
    assert settings.type_name(dict[str, float]) == "mapping"
    defaults = {field.name: field for field in dataclasses.fields(Defaults)}
    assert settings.default(defaults["given"]) == "required"
    assert settings.default(defaults["switch"]) == "`false`"
    assert settings.default(defaults["names"]) == "`[a, b]`"
    assert settings.default(defaults["none"]) == "`null`"


@dataclasses.dataclass
class Defaults:
    given: str = "???"
    switch: bool = False
    names: list[str] = dataclasses.field(default_factory=lambda: ["a", "b"])
    none: int | None = None
