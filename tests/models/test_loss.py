"""The chunked loss equals torch's cross-entropy of the whole logits."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megabase.models.loss import linear_cross_entropy


def plain_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, weights: Tensor | None
) -> Tensor:
    logits = F.linear(hidden, weight, bias).float().flatten(0, 1)
    nats = F.cross_entropy(logits, labels.flatten(), reduction="none")
    return (nats if weights is None else nats * weights.flatten()).sum()


@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_equals_torchs_cross_entropy(chunk, weighted, biased):
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 20, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    labels = torch.randint(0, 11, (2, 20)).masked_fill(torch.rand(2, 20) < 0.3, -100)
    weights = torch.rand(2, 20) if weighted else None
    bias = torch.randn(11, requires_grad=True) if biased else None
    found = linear_cross_entropy(hidden, weight, labels, bias=bias, weights=weights, chunk=chunk)
    plain = plain_loss(hidden, weight, bias, labels, weights)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, plain)
    inputs = [hidden, weight] if bias is None else [hidden, weight, bias]
    for a, b in zip(
        torch.autograd.grad(found / 7, inputs), torch.autograd.grad(plain / 7, inputs), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_gradients_equal_finite_differences():
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((6, 4), (5, 4), (5,))]
    labels = torch.tensor([0, 4, -100, 2, 2, 1])
    assert torch.autograd.gradcheck(
        lambda h, w, b: linear_cross_entropy(h, w, labels, bias=b, chunk=4), inputs
    )


def test_tokens_without_a_label_have_no_loss_even_where_they_are_nan():
    hidden = torch.randn(1, 3, 4)
    hidden[0, 1] = torch.nan
    hidden.requires_grad_()
    loss = linear_cross_entropy(hidden, torch.randn(5, 4), torch.tensor([[1, -100, 2]]))
    loss.backward()
    assert loss.isfinite()
    assert hidden.grad is not None
    assert torch.equal(hidden.grad[0, 1], torch.zeros(4))
    assert linear_cross_entropy(hidden, torch.randn(5, 4), torch.full((1, 3), -100)) == 0


def test_memory_kept_for_backward_does_not_grow_with_the_vocabulary():
    largest = 0

    def pack(x: Tensor) -> Tensor:
        nonlocal largest
        largest = max(largest, x.numel())
        return x

    hidden, weight = torch.randn(1, 512, 4, requires_grad=True), torch.randn(100, 4, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        linear_cross_entropy(hidden, weight, torch.randint(0, 100, (1, 512)), chunk=16)
    assert largest == 512 * 4


def test_labels_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="one label each"):
        linear_cross_entropy(torch.randn(2, 3, 4), torch.randn(5, 4), torch.zeros(3, 2, dtype=torch.int64))
