"""Norms, the short convolution, and values that look ahead."""

import pytest
import torch
import torch.nn.functional as F

from megabase.models.config import NORMS
from megabase.models.layers import ShortConvolution, ValuesAhead
from megabase.models.norm import Norm


def test_norms_add_epsilon_to_the_variance():
    x = torch.randn(3, 8)
    centred = x - x.mean(-1, keepdim=True)
    wanted = {
        "layer": centred * (centred.square().mean(-1, keepdim=True) + 0.5).rsqrt(),
        "rms": x * (x.square().mean(-1, keepdim=True) + 0.5).rsqrt(),
    }
    for kind in NORMS:
        torch.testing.assert_close(Norm(8, kind, 0.5)(x), wanted[kind])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("length", [1, 2, 50])
def test_the_short_convolution_equals_torchs(length, width, causal):
    """Output and gradients. The second sequence ends in padding, which counts as zero."""
    torch.manual_seed(0)
    convolution = ShortConvolution(6, width, causal=causal).double()
    x = torch.randn(2, length, 6, dtype=torch.float64, requires_grad=True)
    mask = torch.arange(length) < torch.tensor([[length], [(length + 1) // 2]])
    before = width - 1 if causal else (width - 1) // 2
    padded = F.pad(x.masked_fill(~mask[..., None], 0.0).mT, (before, width - 1 - before))
    expected = F.conv1d(padded, convolution.weight.T[:, None], groups=6).mT
    found = convolution(x, mask)
    torch.testing.assert_close(found, expected)
    inputs, grad = (x, convolution.weight), torch.randn_like(expected)
    for a, b in zip(
        torch.autograd.grad(found, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_the_short_convolution_starts_as_a_code_of_all_its_tokens():
    """Every tap has the same variance, and so has the output: 1 for inputs of variance 1."""
    torch.manual_seed(0)
    weight = ShortConvolution(4096, 8, causal=True).weight.detach()
    torch.testing.assert_close(weight.square().mean(1), torch.full((8,), 1 / 8), atol=0.02, rtol=0)


@pytest.mark.parametrize("length", [1, 2, 50])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_values_are_mixed_with_the_next_position(length, dtype):
    """Output and gradients. The second sequence ends in padding, which counts as zero; so does what follows the end."""
    torch.manual_seed(0)
    ahead = ValuesAhead(3).double()
    with torch.no_grad():
        ahead.weight.normal_()
    v = torch.randn(2, length, 3 * 4, dtype=torch.float64).to(dtype).requires_grad_()
    mask = torch.arange(length) < torch.tensor([[length], [(length + 1) // 2]])
    found = ahead(v, mask)
    heads = v.double().masked_fill(~mask[..., None], 0.0).unflatten(-1, (3, 4))
    own, following = ahead.weight.to(dtype).double().view(2, 3, 1)
    expected = (own * heads + following * F.pad(heads[:, 1:], (0, 0, 0, 0, 0, 1))).flatten(2)
    tolerance = {"atol": 0.1, "rtol": 0.02} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(found, expected.to(dtype), **tolerance)
    grad = torch.randn_like(found)
    inputs = (v, ahead.weight)
    for a, b in zip(
        torch.autograd.grad(found, inputs, grad),
        torch.autograd.grad(expected.to(dtype), inputs, grad),
        strict=True,
    ):
        torch.testing.assert_close(a, b, **tolerance)


def test_pairs_of_values_are_the_mixed_values_without_the_last():
    ahead = ValuesAhead(3)
    with torch.no_grad():
        ahead.weight.normal_()
    v = torch.randn(2, 7, 12)
    expected = ahead(v, None)[:, :-1].unflatten(-1, (3, 4)).transpose(1, 2)
    torch.testing.assert_close(ahead.pairs(v.unflatten(-1, (3, 4)).transpose(1, 2)), expected)
