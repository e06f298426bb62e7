"""The full shape of a parameter: under ZeRO stage 3 a parameter is an empty placeholder with its shape as attribute."""

from __future__ import annotations

import torch
from torch import nn


def full_shape(parameter: nn.Parameter) -> torch.Size:
    """The shape of a parameter, or that of all its parts together if ZeRO stage 3 has cut it."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def full_size(parameter: nn.Parameter) -> int:
    """The number of elements of a parameter, or that of all its parts together if ZeRO stage 3 has cut it."""
    return full_shape(parameter).numel()
