"""Local attention against dense attention under a band, and against the layer of transformers."""

import pytest
import torch

from megabase.models.attention import local_attention


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


@pytest.mark.parametrize("causal", [True, False])
def test_padding_changes_nothing_for_real_positions(causal):
    q, k, v = (torch.randn(2, 2, 20, 4) for _ in range(3))
    mask = torch.arange(20) < torch.tensor([[20], [13]])
    out = local_attention(q, k, v, window=5, causal=causal, mask=mask)
    alone = local_attention(q[1:, :, :13], k[1:, :, :13], v[1:, :, :13], window=5, causal=causal)
    torch.testing.assert_close(out[1:, :, :13], alone)
    torch.testing.assert_close(out[:1], local_attention(q[:1], k[:1], v[:1], window=5, causal=causal))
    assert not out[1, :, 13:].any()
