"""Sequences in, batches out: files -> shards (prepare) -> index -> windows in an order -> batches -> the data module.

Importing this package is cheap: Lightning and torch are loaded with the names that need them.
"""

from importlib import import_module
from typing import Any

_EXPORTS = {
    "SequenceDataModule": "datamodule",
    "DataConfig": "config",
    "ShardIndex": "index.shard_index",
    "webdataset_pipeline": "batches.webdataset_pipeline",
}


def __getattr__(name: str) -> Any:
    """Import an exported name when it is first used."""
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_EXPORTS]
