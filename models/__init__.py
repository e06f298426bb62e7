"""The reversible Reformer (Kitaev, Kaiser & Levskaya 2020, arXiv 2001.04451) in plain torch.

    from megabase.models import Reformer, ReformerConfig, Seeds

This package imports neither Lightning nor DeepSpeed, and reads no config files. A name is imported when it is first
used, so `from megabase.models import ReformerConfig` does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megabase.models.chance import Seeds
    from megabase.models.classifier import ReformerClassifier
    from megabase.models.config import (
        ConfigError,
        FeedForwardConfig,
        LinformerConfig,
        LocalConfig,
        LSHConfig,
        PerformerConfig,
        ReformerConfig,
    )
    from megabase.models.encoder_decoder import EncoderDecoder
    from megabase.models.generation import generate
    from megabase.models.reformer import Reformer

__all__ = [
    "ConfigError",
    "EncoderDecoder",
    "FeedForwardConfig",
    "LSHConfig",
    "LinformerConfig",
    "LocalConfig",
    "PerformerConfig",
    "Reformer",
    "ReformerClassifier",
    "ReformerConfig",
    "Seeds",
    "generate",
]

_MODULES = {
    "EncoderDecoder": "encoder_decoder",
    "Reformer": "reformer",
    "ReformerClassifier": "classifier",
    "Seeds": "chance",
    "generate": "generation",
}
"""The module of each exported name; the other names are in `config`."""


def __getattr__(name: str) -> Any:
    """Import an exported name when it is first used (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES.get(name, 'config')}"), name)
    globals()[name] = value
    return value
