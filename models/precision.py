"""The autocast state of a forward pass, saved so that the backward pass can run the forward pass again in it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Precision:
    """The autocast state of one device type."""

    device_type: str
    enabled: bool
    dtype: torch.dtype

    @classmethod
    def current(cls, device: torch.device) -> Precision:
        """The current state for `device`."""
        kind = device.type
        return cls(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))

    def restored(self) -> AbstractContextManager[object]:
        """A context manager that sets this state.

        The cache of cast weights is off: a copy cast under no_grad has no autograd history, and a pass that needs the
        weight's gradient would find that copy in the cache.
        """
        return torch.autocast(self.device_type, dtype=self.dtype, enabled=self.enabled, cache_enabled=False)

    def compute_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype in which a matrix product of `dtype` operands is computed."""
        return self.dtype if self.enabled and dtype == torch.float32 else dtype
