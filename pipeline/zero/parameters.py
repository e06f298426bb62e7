"""The full shape of a parameter: ZeRO stage 3 replaces it by an empty placeholder, with that shape in an attribute."""

from __future__ import annotations

import torch
from torch import nn


def full_shape(parameter: nn.Parameter) -> torch.Size:
    """The shape of a parameter as if it were not sharded, in any ZeRO stage."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def full_size(parameter: nn.Parameter) -> int:
    """The number of elements of a parameter as if it were not sharded, in any ZeRO stage."""
    return full_shape(parameter).numel()
