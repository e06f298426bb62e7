"""Checking the keys that `zero.deepspeed` passes on to DeepSpeed, before a process is started.

DeepSpeed ignores a key that it does not know, and a key that another setting decides would be set twice: here both are
errors. DeepSpeed itself shows which keys it knows (`recording.py`). It takes seconds to import, so it is imported only
if `zero.deepspeed` has keys.
"""

from __future__ import annotations

import difflib
import logging
import os
from typing import Any

import torch

from megabase.pipeline.config.keys import flatten
from megabase.pipeline.config.schema import CPU, RunConfig
from megabase.pipeline.errors import UserError, first_line
from megabase.pipeline.zero.recording import RecordingDict
from megabase.pipeline.zero.reserved import HPZ, OURS, REFUSED, ZERO
from megabase.pipeline.zero.settings import check_nvme_path, merged, own_settings


def check(config: RunConfig, *, here: bool = True) -> None:
    """Check `zero.*`; if the run will be `here`, on this machine, `zero.nvme_path` as well.

    Raises:
        UserError: a key of `zero.deepspeed` is unknown to DeepSpeed, decided by another setting, refused or without
            effect; DeepSpeed does not accept its value; or `zero.nvme_path` cannot be written.
    """
    if config.zero.on_disk and here:
        check_nvme_path(config.zero)
    if config.zero.deepspeed:
        _check_keys(config)


def check_ranks(config: RunConfig, ranks: int) -> None:
    """Raise UserError if the groups of ranks that keep a second copy of the weights (hpZ) are not equally large."""
    group = config.zero.deepspeed.get(ZERO, {}).get(HPZ, 1)
    if 1 < group < ranks and ranks % group:
        raise UserError(
            f"zero.deepspeed.{ZERO}.{HPZ}={group} does not divide the {ranks} ranks: set it to the number of ranks of"
            " a node"
        )


def _check_keys(config: RunConfig) -> None:
    given = config.zero.deepspeed
    _import_quietly()
    for key in flatten(given):
        _refuse_reserved(key)
        _refuse_without_effect(key, config)
    own = own_settings(config)
    for section, value in given.items():
        if isinstance(own.get(section), dict) and not isinstance(value, dict):
            raise UserError(f"zero.deepspeed.{section}={value!r}: must hold keys and values")
        _check_with_deepspeed(section, merged(own, {section: value}))


def _refuse_reserved(key: str) -> None:
    """Raise UserError for a dotted key of DeepSpeed that `zero.deepspeed` must not set."""
    for start in _prefixes(_main_name(key)):
        if start in OURS:
            raise UserError(f"zero.deepspeed.{key} is decided by another setting: use {OURS[start]}")
        if start in REFUSED:
            raise UserError(f"zero.deepspeed.{key} cannot be set: {REFUSED[start]}")


def _refuse_without_effect(key: str, config: RunConfig) -> None:
    """Raise UserError for a dotted key of DeepSpeed that has no effect in this run."""
    name, own = _main_name(key), own_settings(config)
    # {prefix of keys: (whether they have an effect in this run, the setting that they need)}.
    needed = {
        "fp16": ("fp16" in own, "trainer.precision=16"),
        "bf16": ("bf16" in own, "trainer.precision=bf16"),
        f"{ZERO}.offload_optimizer": (config.zero.offload == CPU, "zero.offload=cpu"),
        f"{ZERO}.offload_param": (config.zero.offload_parameters == CPU, "zero.offload_parameters=cpu"),
        f"{ZERO}.sub_group_size": (config.zero.stage == 3, "zero.stage=3"),
        f"{ZERO}.{HPZ}": (config.zero.stage == 3, "zero.stage=3"),
        f"{ZERO}.round_robin_gradients": (config.zero.stage in (1, 2), "zero.stage=1 or 2"),
    }
    if name.rpartition(".")[2].startswith("stage3_"):
        needed[name] = (config.zero.stage == 3, "zero.stage=3")
    for start in _prefixes(name):
        effective, setting = needed.get(start, (True, ""))
        if not effective:
            raise UserError(
                f"zero.deepspeed.{key} has an effect only with {setting}: set that, or leave it out"
            )


def _prefixes(key: str) -> list[str]:
    """["a", "a.b", "a.b.c"] of "a.b.c"."""
    parts = key.split(".")
    return [".".join(parts[: end + 1]) for end in range(len(parts))]


def _main_name(key: str) -> str:
    """The name under which OURS and REFUSED list a dotted key, for which DeepSpeed may accept a second name."""
    parts = key.split(".")
    if parts[0] == ZERO and len(parts) > 1:
        parts[1] = _aliases().get(parts[1], parts[1])
    return ".".join(parts)


def _aliases() -> dict[str, str]:
    """{second name: main name (pydantic's alias)} of the keys in DeepSpeed's ZeRO section that have two names."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    fields = DeepSpeedZeroConfig.model_fields.items()
    return {name: field.alias for name, field in fields if field.alias and field.alias != name}


def _import_quietly() -> None:
    if not torch.cuda.is_available():
        os.environ.setdefault(
            "DS_ACCELERATOR", "cpu"
        )  # otherwise DeepSpeed warns on import that it uses the CPU
    import deepspeed

    deepspeed.utils.logging.logger.setLevel(logging.ERROR)


def _check_with_deepspeed(section: str, configuration: dict[str, Any]) -> None:
    """Raise UserError unless DeepSpeed accepts a configuration and reads every key of its `section`."""
    from deepspeed.runtime.config import DeepSpeedConfig
    from pydantic import ValidationError

    place = f"zero.deepspeed.{section}"
    recorded = RecordingDict(configuration)
    try:
        DeepSpeedConfig(recorded)
    except ValidationError as error:
        raise _validation_error(section, error) from None
    except Exception as error:
        # DeepSpeed raises AssertionError, other errors of Python and its own, with messages for the user.
        raise UserError(f"{place}: {first_line(error)}") from None
    if section not in recorded.read:
        raise _unknown(place, recorded.read)
    value = dict.__getitem__(recorded, section)
    # If no key in the section was read, pydantic took the section as one value, and has checked its keys above.
    if isinstance(value, RecordingDict) and value.read and (unread := value.unread()):
        raise _unknown(f"{place}.{unread[0]}", value.read)


def _validation_error(section: str, error: Any) -> UserError:
    """The message for the first of pydantic's errors in a section."""
    first = error.errors()[0]
    # The paths of some of DeepSpeed's models begin one level higher, with the name of the section.
    path = first["loc"][first["loc"][:1] == (section,) :]
    key = ".".join(["zero.deepspeed", section, *map(str, path)])
    if first["type"] == "extra_forbidden":
        return _unknown(key, _known_keys(error.title, first["loc"][:-1]))
    value = "" if isinstance(first["input"], dict) else f"={first['input']!r}"
    return UserError(f"{key}{value}: {first['msg'].removeprefix('Value error, ')}")


def _unknown(key: str, known: set[str]) -> UserError:
    """The error for a key that DeepSpeed does not know; `known` are the keys that it knows in that section."""
    name = key.rpartition(".")[2]
    close = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.4)
    hint = f"did you mean {close[0]!r}?" if close else "see https://www.deepspeed.ai/docs/config-json"
    return UserError(f"{key}: DeepSpeed has no such key; {hint}")


def _known_keys(title: str, path: tuple[int | str, ...]) -> set[str]:
    """The keys of the section at `path` in DeepSpeed's pydantic model named `title`."""
    from deepspeed.runtime.config_utils import DeepSpeedConfigModel
    from pydantic import BaseModel

    unvisited: list[type[BaseModel]] = [DeepSpeedConfigModel]
    models = {}
    while unvisited:
        model = unvisited.pop()
        models[model.__name__] = model
        unvisited += model.__subclasses__()
    found: Any = models.get(title)
    for part in path:
        kinds = [found.model_fields[str(part)].annotation] if found and part in found.model_fields else []
        kinds += [kind for outer in kinds for kind in getattr(outer, "__args__", ())]
        inner = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        found = inner[0] if inner else None
    return {field.alias or name for name, field in found.model_fields.items()} if found else set()
