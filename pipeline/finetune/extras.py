"""Libraries that only fine-tuning needs: the extra `finetune`."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from megabase.pipeline.errors import UserError


def require(module: str) -> Any:
    """Import a module of the extra. Raises UserError with the command that installs it."""
    try:
        return import_module(module)
    except ImportError as error:
        if error.name != module.partition(".")[0]:
            raise
        raise UserError(
            f"fine-tuning needs {module.partition('.')[0]}, which is not installed: pip install 'megabase[finetune]'"
        ) from None
