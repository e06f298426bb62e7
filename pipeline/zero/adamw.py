"""AdamW for ZeRO stage 0 in fp32, the one case in which DeepSpeed steps a plain optimizer.

In all other cases an optimizer of DeepSpeed's wraps ours: it measures the norm of the gradients, and drops an update
whose gradients are not finite. DeepSpeed's engine looks for both at the optimizer, by the names that it has here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class PlainAdamW(torch.optim.AdamW):
    """AdamW that measures the norm of its gradients, and may drop an update that is not finite.

    Attributes:
        drops: read the norm before each update, and drop the update if it is not finite. Otherwise the norm stays on
            the device, and every update is made.
        overflow: whether the last update was dropped, as DeepSpeed's engine calls it.
    """

    drops = False
    overflow = False
    _global_grad_norm: Tensor | None = None

    def measure(self) -> None:
        """Take the norm of the gradients, before they are clipped. They are already averaged over the ranks."""
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        self._global_grad_norm = torch.nn.utils.get_total_norm(gradients)

    def step(self, closure: Any = None) -> Any:
        """AdamW's step, or nothing; afterwards DeepSpeed's engine clears the gradients."""
        assert self._global_grad_norm is not None
        self.overflow = self.drops and not bool(self._global_grad_norm.isfinite())
        return None if self.overflow else super().step(closure)
