"""The reference kernel against finite differences."""

import pytest
import torch
from torch import Tensor

from megabase.models.attention import lsh_attention
from tests.quick import slow


@pytest.mark.parametrize("seed", [0, *map(slow, range(1, 8))])
def test_gradients_equal_finite_differences(seed):
    generator = torch.Generator().manual_seed(seed)
    qk, v = (torch.randn(1, 2, 11, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    buckets = torch.randint(0, 2, (1, 2, 2, 11), generator=generator)
    mask = torch.arange(11)[None] < 9

    def attention(qk: Tensor, v: Tensor) -> Tensor:
        return lsh_attention(
            qk,
            v,
            rounds=2,
            chunk_length=3,
            causal=bool(seed & 1),
            seed=0,
            buckets=buckets,
            mask=mask,
            attend="chunk" if seed & 2 else "window",
            duplicates="once" if seed & 4 else "average",
            backend="reference",
        )

    assert torch.autograd.gradcheck(attention, (qk.requires_grad_(), v.requires_grad_()))
