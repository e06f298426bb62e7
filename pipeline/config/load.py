"""Reading and writing a run's configuration: defaults, then YAML files from left to right, then KEY=VALUE arguments.

A file cannot include another one: instead, give both files, and the right one is merged over the left one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from megabase.datamodules.files import publish
from megabase.pipeline.config.keys import flatten
from megabase.pipeline.config.names import hint, is_setting, sections
from megabase.pipeline.config.schema import RunConfig
from megabase.pipeline.errors import UserError, first_line


def load(
    files: Sequence[str | Path], overrides: Sequence[str] = (), required: Mapping[str, Any] | None = None
) -> RunConfig:
    """Merge the defaults, YAML `files` from left to right, and `overrides` into a validated RunConfig.

    Args:
        files: each may set any part of the tree.
        overrides: settings as "key.path=value".
        required: values by section and name for required keys that neither sets.

    Returns:
        The configuration, for which `RunConfig.validate` passed.

    Raises:
        UserError: a file is missing or is not YAML; a key is unknown (the message names the closest known one); a value
            has the wrong type; a required key is missing; values do not fit together.
        DataError: a setting under `data` cannot work.
        ConfigError: a setting under `model` cannot work.
    """
    merged = _merge(_defaults(), dict(required or {}), "")
    for file in files:
        merged = _merge(merged, _read_yaml(Path(file)), str(file))
    return _completed(merged, overrides)


def with_settings(
    base: RunConfig, values: Mapping[str, Any], source: str, overrides: Sequence[str] = ()
) -> RunConfig:
    """Merge `values` and then `overrides` into a copy of `base`. Returns and raises as `load`.

    Args:
        base: the settings to start from.
        values: settings by section and name.
        source: where `values` come from, for messages.
        overrides: settings as "key.path=value".
    """
    return _completed(_merge(OmegaConf.structured(base), dict(values), source), overrides)


@cache
def _defaults() -> Any:
    """The tree of defaults, which takes longer to make than to merge with settings. `_merge` copies it."""
    return OmegaConf.structured(RunConfig)


def _completed(merged: Any, overrides: Sequence[str]) -> RunConfig:
    """Merge the last settings and check the result."""
    changes = [_parse_override(override) for override in overrides]
    try:
        merged = OmegaConf.merge(merged, *changes)  # at once: each merge copies the tree
    except OmegaConfBaseException:
        for override, change in zip(overrides, changes, strict=True):
            merged = _merge(merged, change, f"argument {override!r}")
    try:
        config = OmegaConf.to_object(merged)
    except MissingMandatoryValue as error:
        key = str(error.full_key)
        raise UserError(f"{key} is missing: set it in a config file or add {key}=VALUE") from None
    except OmegaConfBaseException as error:
        raise UserError(f"config: {first_line(error)}") from None
    assert isinstance(config, RunConfig)
    config.validate()
    return config


def save(config: RunConfig, path: Path) -> None:
    """Write every setting as YAML, which `load` reads back to an equal tree. Raises OSError."""
    publish(path, OmegaConf.to_yaml(OmegaConf.structured(config)).encode())


def _parse_override(override: str) -> Any:
    key, equals, _ = override.partition("=")
    if not equals or not key:
        raise UserError(f"{override!r} is neither a config file nor KEY=VALUE")
    try:
        return OmegaConf.from_dotlist([override])
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"argument {override!r}: {first_line(error)}") from None


def _read_yaml(path: Path) -> Any:
    if not path.exists():
        if is_setting(str(path)):
            raise UserError(f"{path} is a setting, not a config file: write {path}=VALUE, without spaces")
        raise UserError(f"config file {path} does not exist")
    try:
        loaded = OmegaConf.load(path)
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"config file {path} cannot be read as YAML: {first_line(error)}") from None
    if not OmegaConf.is_dict(loaded):
        raise UserError(f"config file {path} must hold keys and values, not a list")
    return loaded


def _merge(base: Any, change: Any, source: str) -> Any:
    """Merge `change` over `base`. `source` is the file or argument that an error message names."""
    try:
        return OmegaConf.merge(base, change)
    except ConfigKeyError as error:
        unknown = _full_key(str(error.full_key or error.key), change)
        raise UserError(f"{source}: unknown key {unknown[:60]!r}; {hint(unknown)}") from None
    except OmegaConfBaseException as error:
        problem, key = first_line(error), str(error.full_key or "value")
        if section := next((key for key in _keys(change) if key in sections()), None):
            raise UserError(
                f"{source}: {section} is a section of settings, not one value: write {section}.NAME=VALUE (in a file,"
                f" `NAME: VALUE` indented below `{section.rpartition('.')[2]}:`); docs/settings.md lists the names"
            ) from None
        if "to Dict[" in problem:
            problem = f"must hold names and values, such as '{key}={{NAME: VALUE}}'"
        if "ListConfig" in problem:
            problem = f"must be a list, such as '{key}=[a,b]'"
        raise UserError(f"{source}: {key}: {problem}") from None


def _full_key(key: str, change: Any) -> str:
    """The dotted key of the first setting in `change` under `key`: OmegaConf names an unknown section only."""
    return next((full for full in _keys(change) if full == key or full.startswith(f"{key}.")), key)


def _keys(change: Any) -> list[str]:
    """The dotted keys that `change` sets."""
    return list(flatten(OmegaConf.to_container(OmegaConf.create(change))))  # type: ignore[arg-type]
