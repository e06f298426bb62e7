"""The kernels agree with each other, and the readable one with finite differences."""

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megabase.models.attention import full_attention, local_attention, lsh_attention
from megabase.models.attention.kernels import chunked, dispatch, native, reference
from megabase.models.attention.kernels.inputs import PairDropout, Rule, SortedOrder
from megabase.models.attention.lsh import draw_rotations, rotate_and_hash
from megabase.models.config import ConfigError

needs_native = pytest.mark.skipif(not native.available(), reason="no C++ compiler")


def random_case(
    seed: int, length: int | None = None
) -> tuple[list[Tensor], SortedOrder, Rule, PairDropout | None]:
    chance = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    rows, rounds, d = chance.randint(1, 5), chance.randint(1, 4), chance.choice([3, 8])
    length = length or chance.choice([1, 2, 3, 7, 16, 31, 64, 65, 130])
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
    return [x.requires_grad_() for x in (q, k, v)], SortedOrder.by_bucket(buckets, mask), rule, dropout


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
    expected = with_gradients(reference.sorted_attention, tensors, *case)
    got = with_gradients(chunked.sorted_attention, tensors, *case)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-8)


def by_rows(q: Tensor, k: Tensor, v: Tensor, *case: Any) -> Tensor:
    """native.sorted_attention of rows (rows, length, d), as one sequence with as many heads."""
    return native.sorted_attention(q[None], k[None], v[None], *case)[0]


@needs_native
@pytest.mark.parametrize("seed", range(200))
def test_native_equals_reference(seed):
    # From 120 on of lengths that take several strips, and blocks that end anywhere.
    length = random.Random(seed).randint(200, 1100) if seed >= 120 else None
    tensors, *case = random_case(seed, length)
    expected = with_gradients(reference.sorted_attention, tensors, *case)
    single = [x.detach().float().requires_grad_() for x in tensors]
    for a, b in zip(with_gradients(by_rows, single, *case), expected, strict=True):
        assert (a.double() - b).norm() <= 2e-5 * max(1.0, b.norm().item())


@needs_native
@pytest.mark.parametrize("seed", range(30))
def test_native_makes_unit_keys_and_reads_any_layout(seed):
    (q, _, v), order, rule, dropout = random_case(seed, random.Random(seed).randint(1, 600))
    case = (order, replace(rule, shared=True), dropout)

    def kernel(backend: str) -> Callable[..., Tensor]:
        return lambda q, v: dispatch.sorted_attention(q[None], None, v[None], *case, backend=backend)[0]

    expected = with_gradients(kernel("reference"), [q, v])
    apart = [x.detach().float().mT.contiguous().mT.requires_grad_() for x in (q, v)]
    heads_inside = [
        x.detach().float().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for x in (q, v)
    ]
    for tensors in (apart, heads_inside):
        for a, b in zip(with_gradients(kernel("native"), tensors), expected, strict=True):
            assert (a.double() - b).norm() <= 2e-5 * max(1.0, b.norm().item())


@needs_native
@pytest.mark.parametrize("attend", ["window", "chunk"])
def test_native_gives_the_same_bits_on_any_number_of_threads(attend):
    torch.manual_seed(0)
    qk, v = (torch.randn(2, 3, 3000, 16, requires_grad=True) for _ in range(2))

    def run(threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        out = lsh_attention(
            qk, v, rounds=2, chunk_length=32, causal=False, seed=1, attend=attend, backend="native"
        )
        return [out, *torch.autograd.grad(out.square().sum(), (qk, v))]

    before = torch.get_num_threads()
    try:
        runs = [run(threads) for threads in (1, 2, 5)]
    finally:
        torch.set_num_threads(before)
    for other in runs[1:]:
        for a, b in zip(other, runs[0], strict=True):
            assert torch.equal(a, b)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n_buckets", "d"), [(2, 3), (10, 24), (64, 64), (256, 40), (1024, 64), (4100, 16)])
def test_native_hash_equals_torch(n_buckets, d, dtype, monkeypatch):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 1500, d).to(dtype)
    rotations = draw_rotations(3, d, rounds=2, n_buckets=n_buckets, seed=1)
    hashed = native.rotate_and_hash(x, rotations)
    assert torch.equal(hashed[:, :, :, 700:701], native.rotate_and_hash(x[:, :, 700:701], rotations))
    monkeypatch.setattr(native, "available", lambda: False)
    theirs = rotate_and_hash(x, rotations)
    # Those whose largest and second largest coordinates are as good as equal may fall to either side.
    assert (hashed == theirs).float().mean() > 0.9995
    assert hashed.unique().numel() > min(n_buckets, 1500) / 2


@needs_native
def test_native_seats_equal_a_stable_sort():
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        length, n_buckets = [1, 7, 200][seed % 3], [1, 4, 300][seed // 7]
        buckets = torch.randint(0, n_buckets, (4, 3, length), generator=generator)
        mask = torch.rand(4, length, generator=generator) < 0.7 if seed % 2 else None
        ours, theirs = native.sort_by_bucket(buckets, n_buckets, mask), SortedOrder.by_bucket(buckets, mask)
        assert torch.equal(ours.positions, theirs.positions)
        assert torch.equal(ours.real_lengths, theirs.real_lengths)
        assert torch.equal(ours.slots, theirs.slots)
        real = torch.arange(length) < ours.real_lengths[:, None, None]
        assert torch.equal(ours.buckets.where(real, -1), theirs.buckets.where(real, -1))


@pytest.fixture
def unbuilt() -> Iterator[None]:
    """As in a process in which attention has not run yet."""
    native._library.cache_clear()
    yield
    native._library.cache_clear()


def test_without_a_compiler_the_chunked_kernel_runs_and_says_so(monkeypatch, unbuilt):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.warns(UserWarning, match=r"no C\+\+ compiler.*Install g\+\+, or set CXX"):
        qk = torch.randn(1, 2, 40, 8)
        assert dispatch.choose_backend(qk, qk) == "chunked"
    with pytest.raises(ConfigError, match=r"backend='native' cannot run here.*chunked"):
        lsh_attention(qk, qk, rounds=1, chunk_length=8, causal=True, seed=0, backend="native")


def test_a_compiler_that_fails_is_named(monkeypatch, tmp_path, unbuilt):
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\n[ $1 = --version ] && exit 0\necho 'cannot find -lstdc++' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setenv("MEGABASE_CACHE", str(tmp_path / "cache"))
    with pytest.warns(UserWarning, match="cannot find -lstdc"):
        assert not native.available()
    assert not list((tmp_path / "cache").iterdir())


def test_what_auto_chooses():
    def choice(dtype: torch.dtype, d: int = 64, backend: str = "auto") -> str:
        x = torch.empty(1, 1, 1, d, dtype=dtype)
        return dispatch.choose_backend(x, x, backend)

    fused = "native" if native.available() else "chunked"
    assert [choice(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)] == [fused] * 3
    assert choice(torch.float64) == "chunked"
    for backend in ("native", "triton"):
        with pytest.raises(
            ConfigError, match=f"'{backend}' cannot run here, with torch.float64 of width 64 on cpu"
        ):
            choice(torch.float64, backend=backend)


@needs_native
def test_a_cache_that_cannot_be_written_does_not_matter(monkeypatch, tmp_path, unbuilt):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MEGABASE_CACHE", str(tmp_path / "file" / "cache"))
    assert native.available()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_chunked_in_lower_precision(dtype, tolerance):
    for seed in range(20):
        tensors, *case = random_case(seed)
        low = [x.detach().to(dtype).requires_grad_() for x in tensors]
        same = [x.detach().double().requires_grad_() for x in low]
        expected = with_gradients(reference.sorted_attention, same, *case)
        for a, b in zip(with_gradients(chunked.sorted_attention, low, *case), expected, strict=True):
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
    def saved(backend: str, rounds: int) -> int:
        sizes: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            if x.is_floating_point():
                sizes[x.data_ptr()] = x.numel()
            return x

        qk, v = (torch.randn(1, 1, 256, 32).requires_grad_() for _ in range(2))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            lsh_attention(qk, v, rounds=rounds, chunk_length=16, causal=True, seed=1, backend=backend)
        return sum(sizes.values())

    # The native kernel keeps one log-sum-exp for each position, the chunked one for each position and round.
    assert saved("native", 9) == saved("native", 1)
    assert saved("chunked", 9) - saved("chunked", 1) == 8 * 256


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
