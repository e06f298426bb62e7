"""Remember the autocast state of a forward pass, and restore it where the backward pass runs it again."""

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
        """The state that holds now for `device`."""
        kind = device.type
        return cls(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))

    def restored(self) -> AbstractContextManager[object]:
        """A context in which that state holds.

        The cache of cast weights is off: one made under no_grad carries no history, and would hide a weight
        from the pass that needs its gradient.
        """
        return torch.autocast(self.device_type, dtype=self.dtype, enabled=self.enabled, cache_enabled=False)

    def compute_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """What a matrix product of `dtype` operands runs in."""
        return self.dtype if self.enabled and dtype == torch.float32 else dtype
