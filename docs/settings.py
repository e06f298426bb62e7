"""Write docs/settings.md: every key of a config with its type, its default and its meaning.

    python docs/settings.py            # renew the page after a change of a setting

The keys come from the dataclasses that a config is merged over, the meanings from the `Attributes:` section of
their docstrings. tests/docs/test_settings.py fails while the page differs from them.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path

from megabase.pipeline.config.schema import RunConfig

PAGE = Path(__file__).with_name("settings.md")
HEAD = """\
<!-- Generated: edit the dataclasses, then run `python docs/settings.py`. -->
# Settings

A config is YAML files and `KEY=VALUE` arguments. They are merged from left to right over the defaults below:

```
megabase train configs/genome-8k.yaml data.shards=data/hg38 run.name=hg38 optim.lr=5e-4
```

The merged config is saved as `config.yaml` in the run directory. An unknown key, a value of the wrong type, and values
that do not fit together are refused before anything starts. `null` and `true` are YAML's. What may change when a run is
resumed: [Resume](resume.md#what-may-change).
"""


def page() -> str:
    """The text of docs/settings.md."""
    sections = [
        f"\n## `{field.name}.*`\n\n{section(field.default_factory, field.name)}"
        for field in dataclasses.fields(RunConfig)
    ]
    return HEAD + "".join(sections)


def section(settings: type, prefix: str) -> str:
    """The title of a dataclass and the table of its keys; nested dataclasses follow as sections of their own."""
    title, meanings = documented(settings)
    hints = typing.get_type_hints(settings)
    rows, nested = [], []
    for field in dataclasses.fields(settings):
        key = f"{prefix}.{field.name}"
        if dataclasses.is_dataclass(hints[field.name]):
            nested.append(f"\n### `{key}.*`\n\n{section(hints[field.name], key)}")
            continue
        meaning = meanings[field.name].replace("|", r"\|")
        rows.append(f"| `{key}` | {type_name(hints[field.name])} | {default(field)} | {meaning} |\n")
    table = "| key | type | default | meaning |\n|---|---|---|---|\n" + "".join(rows)
    return f"{title}\n\n{table}" + "".join(nested)


def documented(settings: type) -> tuple[str, dict[str, str]]:
    """The first paragraph of a class docstring, and what its `Attributes:` section says about each attribute."""
    title, _, attributes = inspect.cleandoc(settings.__doc__ or "").partition("\n\nAttributes:\n")
    entries = re.findall(r"^    (\w+): (.*(?:\n     .*)*)", attributes, flags=re.MULTILINE)
    return " ".join(title.split()), {name: " ".join(meaning.split()) for name, meaning in entries}


def type_name(hint: object) -> str:
    """A type as a reader of YAML knows it, such as "int or null" or "list of str"."""
    return " or ".join(_type_names(hint))


def _type_names(hint: object) -> Iterator[str]:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        for argument in arguments:
            yield from _type_names(argument)
    elif origin is list:
        yield f"list of {type_name(arguments[0])}"
    elif origin is dict:
        yield "mapping"
    elif hint is types.NoneType:
        yield "null"
    else:
        yield getattr(hint, "__name__", str(hint))


def default(field: dataclasses.Field[object]) -> str:
    """A default as YAML writes it; "required" where a value must be given."""
    value = field.default
    if value is dataclasses.MISSING:
        assert field.default_factory is not dataclasses.MISSING
        value = field.default_factory()
    if value == "???":
        return "required"
    if isinstance(value, list):
        return f"`[{', '.join(map(str, value))}]`"
    words = {"None": "null", "True": "true", "False": "false"}
    return f"`{words.get(str(value), value)}`"


if __name__ == "__main__":
    PAGE.write_text(page())
