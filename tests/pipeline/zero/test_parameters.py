"""The full shape of a parameter."""

import torch
from torch import nn

from megabase.pipeline.zero.parameters import full_shape, full_size


def test_the_full_shape_of_a_placeholder_of_stage_3_is_that_of_its_attribute() -> None:
    weight = nn.Parameter(torch.zeros(2, 3))
    assert full_shape(weight) == (2, 3) and full_size(weight) == 6
    placeholder = nn.Parameter(torch.empty(0))
    placeholder.ds_shape = torch.Size([4, 5])  # type: ignore[attr-defined]
    assert full_shape(placeholder) == (4, 5) and full_size(placeholder) == 20
