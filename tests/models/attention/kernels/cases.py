"""Random problems for the kernels of attention, and what is compared."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megabase.models.attention.kernels import native
from megabase.models.attention.kernels.inputs import PairDropout, Rule, SortedOrder

needs_native = pytest.mark.skipif(not native.available(), reason="no C++ compiler")


def random_case(
    seed: int, length: int | None = None
) -> tuple[list[Tensor], SortedOrder, Rule, PairDropout | None]:
    """q, k, v (rows, length, d) in fp64, and the other arguments of a kernel."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    rows, rounds, d = rng.randint(1, 5), rng.randint(1, 4), rng.choice([3, 8])
    length = length or rng.choice([1, 2, 3, 7, 16, 31, 64, 65, 130])
    q, k, v = (torch.randn(rows, length, d, generator=generator, dtype=torch.float64) for _ in range(3))
    mask = torch.rand(rows, length, generator=generator) < 0.7 if rng.random() < 0.4 else None
    buckets = torch.randint(0, rng.choice([1, 3, 8]), (rows, rounds, length), generator=generator)
    rule = Rule(
        reach=rng.choice([1, 2, 5, 16, 40]),
        attend=rng.choice(["window", "chunk"]),
        causal=rng.random() < 0.5,
        once=rng.random() < 0.5,
        own=rng.choice(["always", "alone", "alone", "never"]),
    )
    keys = torch.randint(-(2**62), 2**62, (rows,), generator=generator)
    dropout = PairDropout(0.3, keys) if rng.random() < 0.3 else None
    return [x.requires_grad_() for x in (q, k, v)], SortedOrder.by_bucket(buckets, mask), rule, dropout


def with_gradients(attention: Callable[..., Tensor], tensors: list[Tensor], *case: object) -> list[Tensor]:
    """The output of an attention function, and the gradients of `tensors`."""
    out = attention(*tensors, *case)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(
        out.dtype
    )
    return [out, *torch.autograd.grad(out, tensors, grad)]
