"""Checks of settings, and how a dataclass of settings is built from a dictionary.

Each check raises ConfigError, whose message names the setting (`key`) and its value. This module needs no torch.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

SINGLE_ROTATION = 128
"""Up to this many buckets, one rotation makes a hash. Above it, the hashes of two rotations are combined."""


class ConfigError(ValueError):
    """A setting that cannot work. The message is one line: what is wrong, where, the value, and what to do."""


def check_name(key: str, value: str, valid: Iterable[str]) -> None:
    """Raise ConfigError if `value` is not one of `valid`. The message suggests the closest one."""
    valid = tuple(valid)
    if value in valid:
        return
    close = difflib.get_close_matches(str(value), valid, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise ConfigError(f"{key}={value!r} is unknown: {hint}valid: {', '.join(valid)}")


def check_at_least(least: int, key: str, value: int) -> None:
    """Raise ConfigError if `value` is below `least`."""
    if value < least:
        raise ConfigError(f"{key}={value} must be at least {least}")


def check_rate(key: str, value: float | None) -> None:
    """Raise ConfigError unless `value` is None or a rate in [0, 1)."""
    if value is not None and not 0.0 <= value < 1.0:
        raise ConfigError(f"{key}={value} must be at least 0 and below 1")


def check_buckets(n: int, key: str) -> None:
    """Raise ConfigError unless keys can be hashed into `n` buckets: even, and a multiple of 4 above SINGLE_ROTATION."""
    step = 2 if n <= SINGLE_ROTATION else 4
    if n < 2 or n % step:
        raise ConfigError(
            f"{key}={n} must be a positive multiple of {step}: take {max(step, round_up(max(n, 1), step))}"
        )


def round_up(value: int, step: int) -> int:
    """The smallest multiple of `step` that is at least `value`."""
    return -(-value // step) * step


def build(default: Any, values: Mapping[str, Any], place: str) -> Any:
    """A copy of a dataclass with other values.

    Args:
        default: the dataclass; its fields may be dataclasses too.
        values: by field name. The values of a nested dataclass are a mapping, or have dotted names (`lsh.rounds`).
        place: the name of `default` in messages.

    Raises:
        ConfigError: a name is unknown, or a nested dataclass is given one value.
    """
    settings = {field.name: getattr(default, field.name) for field in fields(default)}
    groups: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        name, _, rest = key.partition(".")
        group = is_dataclass(settings.get(name))
        if name not in settings or (rest and not group):
            raise ConfigError(
                f"{place}.{key} is a setting that this version does not know: correct its name, or update megabase"
            )
        if not group:
            settings[name] = value
        elif rest:
            groups.setdefault(name, {})[rest] = value
        elif isinstance(value, Mapping):
            groups.setdefault(name, {}).update(value)
        else:
            raise ConfigError(f"{place}.{name}={value!r} must be a group of settings, not one value")
    for name, group_values in groups.items():
        settings[name] = build(settings[name], group_values, f"{place}.{name}")
    return type(default)(**settings)
