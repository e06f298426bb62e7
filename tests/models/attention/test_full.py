"""Full attention: padding, dropout of weights, and its definition."""

from functools import partial

import pytest
import torch

from megabase.models.attention import full_attention, local_attention
from megabase.models.attention.kernels.inputs import PairDropout


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("length", [1, 20])
def test_equals_its_definition(causal, own, length):
    q, k, v = (torch.randn(2, 3, length, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    distance = torch.arange(length)[:, None] - torch.arange(length)
    seen = (distance >= 0) | torch.tensor(not causal)
    seen &= (distance != 0) | torch.tensor(own)
    empty = ~seen.any(-1, keepdim=True)
    scores = (q @ k.mT / 2).masked_fill(~(seen | empty), -torch.inf)
    expected = (scores.softmax(-1) @ v).masked_fill(empty, 0.0)
    attend = partial(full_attention, causal=causal, own=own)
    out = attend(q, k, v)
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    for a, b in zip(
        torch.autograd.grad(out, (q, k, v), grad),
        torch.autograd.grad(expected, (q, k, v), grad),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    no_dropout = PairDropout(0.0, torch.arange(6))
    torch.testing.assert_close(attend(q, k, v, dropout=no_dropout), out, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("own", [True, False])
def test_padding_changes_nothing_for_real_positions(causal, own):
    q, k, v = (torch.randn(2, 2, 20, 4) for _ in range(3))
    mask = torch.arange(20) < torch.tensor([[20], [13]])
    attend = partial(full_attention, causal=causal, own=own)
    out = attend(q, k, v, mask=mask)
    torch.testing.assert_close(out[1:, :, :13], attend(q[1:, :, :13], k[1:, :, :13], v[1:, :, :13]))
    torch.testing.assert_close(out[:1], attend(q[:1], k[:1], v[:1]))
    assert not out[1, :, 13:].any()


def test_dropout_drops_the_same_pairs_as_the_sorted_kernel():
    q, k, v = (torch.randn(2, 2, 20, 4, dtype=torch.float64) for _ in range(3))
    dropout = PairDropout(0.4, torch.arange(4) * 12345678901)
    full = full_attention(q, k, v, causal=True, dropout=dropout)
    local = local_attention(q, k, v, window=20, causal=True, dropout=dropout)
    torch.testing.assert_close(full, local, atol=1e-6, rtol=1e-6)
    assert not torch.allclose(full, full_attention(q, k, v, causal=True))
