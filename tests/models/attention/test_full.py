"""Full attention: padding, dropout of weights, and its definition."""

import pytest
import torch

from megabase.models.attention import full_attention, local_attention
from megabase.models.attention.kernels.inputs import PairDropout


@pytest.mark.parametrize("causal", [True, False])
def test_equals_its_definition(causal):
    q, k, v = (torch.randn(2, 3, 20, 4, dtype=torch.float64) for _ in range(3))
    scores = q @ k.mT / 2
    if causal:
        scores = scores.masked_fill(~torch.ones(20, 20, dtype=torch.bool).tril(), -torch.inf)
    expected = scores.softmax(-1) @ v
    torch.testing.assert_close(full_attention(q, k, v, causal=causal), expected)
    no_dropout = PairDropout(0.0, torch.arange(6))
    dropped = full_attention(q, k, v, causal=causal, dropout=no_dropout)
    torch.testing.assert_close(dropped, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("causal", [True, False])
def test_padding_changes_nothing_for_real_positions(causal):
    q, k, v = (torch.randn(2, 2, 20, 4) for _ in range(3))
    mask = torch.arange(20) < torch.tensor([[20], [13]])
    out = full_attention(q, k, v, causal=causal, mask=mask)
    alone = full_attention(q[1:, :, :13], k[1:, :, :13], v[1:, :, :13], causal=causal)
    torch.testing.assert_close(out[1:, :, :13], alone)
    torch.testing.assert_close(out[:1], full_attention(q[:1], k[:1], v[:1], causal=causal))
    assert not out[1, :, 13:].any()


def test_dropout_drops_the_same_pairs_as_the_sorted_kernel():
    q, k, v = (torch.randn(2, 2, 20, 4, dtype=torch.float64) for _ in range(3))
    dropout = PairDropout(0.4, torch.arange(4) * 12345678901)
    full = full_attention(q, k, v, causal=True, dropout=dropout)
    local = local_attention(q, k, v, window=20, causal=True, dropout=dropout)
    torch.testing.assert_close(full, local, atol=1e-6, rtol=1e-6)
    assert not torch.allclose(full, full_attention(q, k, v, causal=True))
