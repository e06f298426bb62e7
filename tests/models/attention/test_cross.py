"""Cross-attention equals its formula, with masks and dropout."""

import pytest
import torch

from megabase.models.attention.cross import cross_attention
from megabase.models.attention.kernels.inputs import PairDropout


def test_cross_attention_is_softmax_over_the_real_source():
    q, k, v = torch.randn(2, 2, 5, 4), torch.randn(2, 2, 7, 4), torch.randn(2, 2, 7, 4)
    mask = torch.rand(2, 7) < 0.6
    scores = (q @ k.mT / 2).masked_fill(~mask[:, None, None], -torch.inf)
    torch.testing.assert_close(cross_attention(q, k, v, mask=mask), scores.softmax(-1) @ v)
    nearly_none = PairDropout(1e-9, torch.arange(4))
    dropped = cross_attention(q, k, v, mask=mask, dropout=nearly_none)
    torch.testing.assert_close(dropped, scores.softmax(-1) @ v)


@pytest.mark.parametrize("rate", [0.0, 0.2])
def test_a_source_without_real_tokens_gives_zeros(rate):
    q, kv = torch.randn(2, 2, 5, 4), torch.randn(2, 2, 41, 4)
    mask = torch.tensor([[True], [False]]).expand(2, 41)
    dropout = PairDropout(rate, torch.arange(4)) if rate else None
    y = cross_attention(q, kv, kv, mask=mask, dropout=dropout)
    assert (y[1] == 0).all()
    assert (y[0] != 0).all()
