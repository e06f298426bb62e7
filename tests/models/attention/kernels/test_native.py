"""The C++ kernel against the reference and against torch."""

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megabase.models.attention import lsh_attention
from megabase.models.attention.kernels import dispatch, native, reference
from megabase.models.attention.kernels.inputs import SortedOrder
from megabase.models.attention.lsh import draw_rotations, rotate_and_hash
from tests.models.attention.kernels.cases import needs_native, random_case, with_gradients
from tests.quick import every


def by_rows(q: Tensor, k: Tensor, v: Tensor, *case: Any) -> Tensor:
    """native.sorted_attention of rows (rows, length, d), as one sequence with as many heads."""
    return native.sorted_attention(q[None], k[None], v[None], *case)[0]


@needs_native
@pytest.mark.parametrize("seed", every(8, range(200)))
def test_native_equals_reference(seed):
    # From seed 120 on, sequences take several strips and blocks end anywhere.
    length = random.Random(seed).randint(200, 1100) if seed >= 120 else None
    tensors, *case = random_case(seed, length)
    expected = with_gradients(reference.sorted_attention, tensors, *case)
    single = [x.detach().float().requires_grad_() for x in tensors]
    for a, b in zip(with_gradients(by_rows, single, *case), expected, strict=True):
        assert (a.double() - b).norm() <= 2e-5 * max(1.0, b.norm().item())


@needs_native
@pytest.mark.parametrize("seed", every(6, range(30)))
def test_native_makes_unit_keys_and_reads_any_layout(seed):
    (q, _, v), order, rule, dropout = random_case(seed, random.Random(seed).randint(1, 600))
    case = (order, replace(rule, own="never" if seed % 3 == 0 else "alone"), dropout)

    def kernel(backend: str) -> Callable[..., Tensor]:
        return lambda q, v: dispatch.sorted_attention(q[None], None, v[None], *case, backend=backend)[0]

    expected = with_gradients(kernel("reference"), [q, v])
    strided_rows = [x.detach().float().mT.contiguous().mT.requires_grad_() for x in (q, v)]
    heads_within_positions = [
        x.detach().float().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for x in (q, v)
    ]
    for tensors in (strided_rows, heads_within_positions):
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
    expected = rotate_and_hash(x, rotations)
    # A vector whose two largest coordinates differ by less than rounding may get either bucket.
    assert (hashed == expected).float().mean() > 0.9995
    assert hashed.unique().numel() > min(n_buckets, 1500) / 2


@needs_native
def test_native_order_equals_a_stable_sort():
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        length, n_buckets = [1, 7, 200][seed % 3], [1, 4, 300][seed // 7]
        buckets = torch.randint(0, n_buckets, (4, 3, length), generator=generator)
        mask = torch.rand(4, length, generator=generator) < 0.7 if seed % 2 else None
        sorted_here, expected = (
            native.sort_by_bucket(buckets, n_buckets, mask),
            SortedOrder.by_bucket(buckets, mask),
        )
        assert torch.equal(sorted_here.positions, expected.positions)
        assert torch.equal(sorted_here.real_lengths, expected.real_lengths)
        assert torch.equal(sorted_here.slots, expected.slots)
        real = torch.arange(length) < sorted_here.real_lengths[:, None, None]
        assert torch.equal(sorted_here.buckets.where(real, -1), expected.buckets.where(real, -1))
