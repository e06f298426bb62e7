"""Local attention against dense attention under a band, and against the layer of transformers."""

import pytest
import torch

from megabase.models.attention import full_attention, local_attention
from megabase.models.attention.kernels.inputs import PairDropout


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("length", "window"), [(1, 4), (7, 1), (50, 8), (101, 33), (200, 300)])
def test_local_equals_banded_dense_attention(causal, length, window):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, length, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    distance = torch.arange(length)[:, None] - torch.arange(length)
    band = (distance >= 0) & (distance < window) if causal else distance.abs() < window
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=band)
    out = local_attention(q, k, v, window=window, causal=causal)
    torch.testing.assert_close(out, expected)
    for a, b in zip(
        torch.autograd.grad(out.square().sum(), (q, k, v)),
        torch.autograd.grad(expected.square().sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("causal", [True, False])
def test_local_chunks_equal_the_transformers_layer(causal):
    from transformers import ReformerConfig as HuggingFaceConfig
    from transformers.models.reformer.modeling_reformer import LocalSelfAttention

    torch.manual_seed(0)
    config = HuggingFaceConfig(
        hidden_size=16,
        num_attention_heads=2,
        attention_head_size=8,
        local_attn_chunk_length=8,
        local_num_chunks_after=0,
        local_attention_probs_dropout_prob=0.0,
        is_decoder=causal,
    )
    layer = LocalSelfAttention(config, layer_idx=0).double()
    hidden = torch.randn(2, 32, 16, dtype=torch.float64)
    q, k, v = (p(hidden).view(2, 32, 2, 8).transpose(1, 2) for p in (layer.query, layer.key, layer.value))
    out = local_attention(q, k, v, window=8, causal=causal, attend="chunk")
    torch.testing.assert_close(out.transpose(1, 2).flatten(2), layer(hidden).hidden_states)


@pytest.mark.parametrize("attention", [full_attention, lambda *x, **s: local_attention(*x, window=5, **s)])
@pytest.mark.parametrize("causal", [True, False])
def test_padding_changes_nothing_in_full_and_local_attention(attention, causal):
    q, k, v = (torch.randn(2, 2, 20, 4) for _ in range(3))
    mask = torch.arange(20) < torch.tensor([[20], [13]])
    out = attention(q, k, v, causal=causal, mask=mask)
    alone = attention(q[1:, :, :13], k[1:, :, :13], v[1:, :, :13], causal=causal)
    torch.testing.assert_close(out[1:, :, :13], alone)
    torch.testing.assert_close(out[:1], attention(q[:1], k[:1], v[:1], causal=causal))
    assert not out[1, :, 13:].any()


def test_full_attention_drops_the_same_pairs_as_the_sorted_kernel():
    q, k, v = (torch.randn(2, 2, 20, 4, dtype=torch.float64) for _ in range(3))
    dropout = PairDropout(0.4, torch.arange(4) * 12345678901)
    full = full_attention(q, k, v, causal=True, dropout=dropout)
    local = local_attention(q, k, v, window=20, causal=True, dropout=dropout)
    torch.testing.assert_close(full, local, atol=1e-6, rtol=1e-6)
    assert not torch.allclose(full, full_attention(q, k, v, causal=True))
