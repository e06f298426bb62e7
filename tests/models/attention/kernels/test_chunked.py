"""The chunked kernel against the reference."""

import random

import pytest
import torch
from torch import Tensor

from megabase.models.attention import lsh_attention
from megabase.models.attention.kernels import chunked, reference
from tests.models.attention.kernels.cases import random_case, with_gradients
from tests.quick import every


@pytest.mark.parametrize("seed", every(6, range(120)))
def test_chunked_equals_reference(seed, monkeypatch):
    # Small groups, so that short sequences have several of them.
    monkeypatch.setattr(chunked, "GROUP", random.Random(seed).choice([1, 2000, 1 << 18]))
    monkeypatch.setattr(chunked, "SORTED", random.Random(seed).choice([1, 500, 1 << 18]))
    tensors, *case = random_case(seed)
    expected = with_gradients(reference.sorted_attention, tensors, *case)
    got = with_gradients(chunked.sorted_attention, tensors, *case)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_chunked_in_lower_precision(dtype, tolerance):
    for seed in range(20):
        tensors, *case = random_case(seed)
        low = [x.detach().to(dtype).requires_grad_() for x in tensors]
        same = [x.detach().double().requires_grad_() for x in low]
        expected = with_gradients(reference.sorted_attention, same, *case)
        # A gradient may cancel to almost zero. Then its rounding is that of the terms that cancel.
        size = max(1.0, *(x.norm().item() for x in expected))
        for a, b in zip(with_gradients(chunked.sorted_attention, low, *case), expected, strict=True):
            assert a.dtype == dtype
            assert (a.double() - b).norm() <= tolerance * size


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
