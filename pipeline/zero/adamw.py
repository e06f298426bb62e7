"""AdamW for ZeRO stage 0 in fp32, the one case in which DeepSpeed steps a plain optimizer.

In all other cases DeepSpeed wraps our optimizer in one of its own, which measures the norm of the gradients and drops
an update whose gradients are not finite. DeepSpeed's engine reads both results from the optimizer, as the attributes
`_global_grad_norm` and `overflow`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class PlainAdamW(torch.optim.AdamW):
    """AdamW that measures the norm of its gradients, and can drop an update whose gradients are not finite.

    Attributes:
        drops: True: read the norm from the device before each update, and drop the update if the norm is not finite.
            False: make every update, without reading the norm.
        overflow: whether the last update was dropped. DeepSpeed's engine reads it by this name.
    """

    drops = False
    overflow = False
    _global_grad_norm: Tensor | None = None

    def measure(self) -> None:
        """Measure the norm of the gradients. Call it when they are averaged over the ranks and not yet clipped."""
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        self._global_grad_norm = torch.nn.utils.get_total_norm(gradients)

    def step(self, closure: Any = None) -> Any:
        """Make or drop an update. Call `measure` before; DeepSpeed's engine clears the gradients afterwards."""
        assert self._global_grad_norm is not None
        self.overflow = self.drops and not bool(self._global_grad_norm.isfinite())
        return None if self.overflow else super().step(closure)
