"""Local attention against dense attention under a band, and against the layer of transformers."""

from functools import partial

import pytest
import torch

from megabase.models import ReformerConfig
from megabase.models.attention import build_attention, local_attention


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize(("length", "window"), [(1, 4), (7, 1), (50, 8), (101, 33), (200, 300)])
def test_local_equals_banded_dense_attention(causal, own, length, window):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, length, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    distance = torch.arange(length)[:, None] - torch.arange(length)
    # Without its own key a position attends to as many keys as with it: the window begins one position earlier.
    near = distance.abs() < window if own else (distance.abs() <= window) & (distance != 0)
    band = near & (distance >= 0) if causal else near
    empty = ~band.any(-1, keepdim=True)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=band | empty)
    expected = expected.masked_fill(empty, 0.0)
    out = local_attention(q, k, v, window=window, causal=causal, own=own)
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
@pytest.mark.parametrize("own", [True, False])
def test_padding_changes_nothing_for_real_positions(causal, own):
    q, k, v = (torch.randn(2, 2, 20, 4) for _ in range(3))
    mask = torch.arange(20) < torch.tensor([[20], [13]])
    attend = partial(local_attention, window=5, causal=causal, own=own)
    out = attend(q, k, v, mask=mask)
    torch.testing.assert_close(out[1:, :, :13], attend(q[1:, :, :13], k[1:, :, :13], v[1:, :, :13]))
    torch.testing.assert_close(out[:1], attend(q[:1], k[:1], v[:1]))
    assert not out[1, :, 13:].any()


@pytest.mark.parametrize("kind", ["local", "full", "performer"])
def test_keys_start_as_queries_do(kind):
    """And what is drawn after them is new."""
    layer = build_attention(
        ReformerConfig(vocab_size=9, dim=16, heads=2, depth=1, layers=[kind]), 0
    ).attention
    assert torch.equal(layer.query.weight, layer.key.weight)
    assert not torch.equal(layer.key.weight, layer.value.weight)
