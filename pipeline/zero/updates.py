"""The size of Adam's last step beside that of the weights, computed from the optimizer's states."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

# Elements that are computed at once, to bound the memory of the temporaries.
AT_ONCE = 1 << 24


def update_ratio(optimizer: torch.optim.Optimizer) -> float:
    """‖Adam's step‖ / ‖weights‖ over all weights of all ranks. All ranks call it; it communicates two numbers.

    Weight decay, which takes lr · weight_decay of each weight, is not in the step.

    Args:
        optimizer: torch's AdamW that DeepSpeed steps. Under ZeRO its states are those of this rank's shard.
    """
    sums = step_and_weights(optimizer)
    if dist.is_initialized():
        dist.all_reduce(sums)
    return float((sums[0] / sums[1]).sqrt())


def step_and_weights(optimizer: torch.optim.Optimizer) -> Tensor:
    """(2,) fp64 on the device: the sum of squares of Adam's last step, and of the weights, of this rank."""
    # ZeRO stage 3 takes the parameters out of the groups between two steps; the settings of all groups are alike.
    group = optimizer.param_groups[0]
    beta1, beta2 = group["betas"]
    sums: list[Tensor] = []
    for weights, state in optimizer.state.items():
        count = float(state["step"])
        scale = group["lr"] / (1 - beta1**count)
        parts = (
            x.detach().flatten().split(AT_ONCE) for x in (weights, state["exp_avg"], state["exp_avg_sq"])
        )
        for weight, mean, square in zip(*parts, strict=True):
            root = (square.float() / (1 - beta2**count)).sqrt_().add_(group["eps"])
            step = mean.float().div(root).mul_(scale)
            sums.append(torch.stack([step.square().sum().double(), weight.float().square().sum().double()]))
    return torch.stack(sums).sum(dim=0)
