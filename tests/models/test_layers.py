"""Norms and the short convolution."""

import pytest
import torch
import torch.nn.functional as F

from megabase.models.config import NORMS
from megabase.models.layers import Norm, ShortConvolution


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
