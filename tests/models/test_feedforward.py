"""The feed-forward branch in chunks equals the branch in one piece."""

import pytest
import torch
from torch import Tensor, nn

from megabase.models import FeedForwardConfig, ReformerConfig
from megabase.models.feedforward import FeedForward


def feedforward(activation: str, chunk: int) -> FeedForward:
    torch.manual_seed(1)
    setting = FeedForwardConfig(mult=3.0, activation=activation, chunk=chunk)
    return FeedForward(ReformerConfig(vocab_size=9, dim=8, feedforward=setting))


def grads_of(module: nn.Module, x: Tensor) -> list[Tensor]:
    y = module(x)
    return [y, *torch.autograd.grad(y.sin().sum(), [x, *module.parameters()])]


@pytest.mark.parametrize("activation", ["gelu", "relu", "swiglu"])
@pytest.mark.parametrize("chunk", [1, 7, 32, 33, 1000])
def test_chunks_equal_one_piece(activation, chunk):
    x = torch.randn(2, 16, 8, requires_grad=True)
    for a, b in zip(
        grads_of(feedforward(activation, chunk), x), grads_of(feedforward(activation, 0), x), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_a_second_pass_gives_the_same_bits():
    x = torch.randn(2, 16, 8, requires_grad=True)
    module = feedforward("gelu", 5)
    for a, b in zip(grads_of(module, x), grads_of(module, x), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("precision", ["autocast", "bf16"])
def test_chunks_equal_one_piece_in_low_precision(precision):
    x = torch.randn(2, 16, 8)
    modules = [feedforward("gelu", 5), feedforward("gelu", 0)]
    if precision == "bf16":
        x, modules = x.bfloat16(), [module.bfloat16() for module in modules]
    x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        chunked, expected = (grads_of(module, x) for module in modules)
    for a, b in zip(chunked, expected, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, atol=0.05, rtol=0.05)
