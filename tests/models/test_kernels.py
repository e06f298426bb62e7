"""The kernels agree with each other, and the readable one with finite differences."""

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from models.attention import full_attention, local_attention, lsh_attention
from models.attention.kernels import PairDropout, Rule, Seating, chunked, reference


def random_case(seed: int) -> tuple[list[Tensor], Seating, Rule, PairDropout | None]:
    chance = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    rows, rounds, d = chance.randint(1, 5), chance.randint(1, 4), chance.choice([3, 8])
    length = chance.choice([1, 2, 3, 7, 16, 31, 64, 65, 130])
    q, k, v = (torch.randn(rows, length, d, generator=generator, dtype=torch.float64) for _ in range(3))
    mask = torch.rand(rows, length, generator=generator) < 0.7 if chance.random() < 0.4 else None
    buckets = torch.randint(0, chance.choice([1, 3, 8]), (rows, rounds, length), generator=generator)
    rule = Rule(
        reach=chance.choice([1, 2, 5, 16, 40]),
        attend=chance.choice(["window", "chunk"]),
        causal=chance.random() < 0.5,
        once=chance.random() < 0.5,
        shared=chance.random() < 0.7,
    )
    keys = torch.randint(-(2**62), 2**62, (rows,), generator=generator)
    dropout = PairDropout(0.3, keys) if chance.random() < 0.3 else None
    return [x.requires_grad_() for x in (q, k, v)], Seating.by_bucket(buckets, mask), rule, dropout


def with_gradients(meet: Callable[..., Tensor], tensors: list[Tensor], *case: object) -> list[Tensor]:
    out = meet(*tensors, *case)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(
        out.dtype
    )
    return [out, *torch.autograd.grad(out, tensors, grad)]


@pytest.mark.parametrize("seed", range(120))
def test_chunked_equals_reference(seed, monkeypatch):
    # Small groups, so that short sequences have several of them.
    monkeypatch.setattr(chunked, "GROUP", random.Random(seed).choice([1, 2000, 1 << 18]))
    monkeypatch.setattr(chunked, "SORTED", random.Random(seed).choice([1, 500, 1 << 18]))
    tensors, *case = random_case(seed)
    expected = with_gradients(reference.meet, tensors, *case)
    got = with_gradients(chunked.meet, tensors, *case)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_chunked_in_lower_precision(dtype, tolerance):
    for seed in range(20):
        tensors, *case = random_case(seed)
        low = [x.detach().to(dtype).requires_grad_() for x in tensors]
        same = [x.detach().double().requires_grad_() for x in low]
        expected = with_gradients(reference.meet, same, *case)
        for a, b in zip(with_gradients(chunked.meet, low, *case), expected, strict=True):
            assert a.dtype == dtype
            assert (a.double() - b).norm() <= tolerance * max(1.0, b.norm().item())


@pytest.mark.parametrize("seed", range(8))
def test_reference_gradients(seed):
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


@pytest.mark.parametrize("length", [1, 5, 64, 200])
def test_the_same_input_gives_the_same_bits(length):
    qk, v = (torch.randn(2, 2, length, 8).requires_grad_() for _ in range(2))

    def run() -> list[Tensor]:
        out = lsh_attention(qk, v, rounds=3, chunk_length=16, causal=True, seed=1, attend="chunk")
        return [out, *torch.autograd.grad(out.square().sum(), (qk, v))]

    for a, b in zip(run(), run(), strict=True):
        assert torch.equal(a, b)


def test_memory_saved_for_backward_does_not_grow_with_rounds():
    def saved(rounds: int) -> int:
        sizes: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            if x.is_floating_point():
                sizes[x.data_ptr()] = x.numel()
            return x

        qk, v = (torch.randn(1, 1, 256, 32).requires_grad_() for _ in range(2))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            lsh_attention(qk, v, rounds=rounds, chunk_length=16, causal=True, seed=1)
        return sum(sizes.values())

    # Besides one log-sum-exp for each position and round, nothing grows.
    assert saved(9) - saved(1) == 8 * 256


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
