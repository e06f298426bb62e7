"""Settings by their dotted keys, such as `data.length`, which messages and manifests use."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def dotted(config: DataclassInstance) -> dict[str, Any]:
    """Every setting of a tree of dataclasses, such as a RunConfig: {"a.b.c": value}."""
    return flatten(dataclasses.asdict(config))


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested dictionaries to {"a.b.c": value}. An empty dictionary counts as a value.

    Args:
        tree: nested dictionaries.
        prefix: text before every key.
    """
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
