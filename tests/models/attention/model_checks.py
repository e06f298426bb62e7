"""Checks of a whole model that every kind of attention layer must pass. The tests of a kind call them."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from megabase.models import Reformer, ReformerConfig, Seeds

LENGTH = 40
"""Tokens of every sequence here."""


def tokens(seed: int = 0, batch: int = 2) -> Tensor:
    """(batch, LENGTH) random DNA tokens."""
    return torch.randint(5, 9, (batch, LENGTH), generator=torch.Generator().manual_seed(seed))


def loss_and_gradients(
    model: Reformer, *, reverse: bool, autocast: bool = False
) -> tuple[Tensor, list[Tensor]]:
    """The loss, and the gradient of every parameter."""
    seeds = Seeds(run=3, step=5, samples=torch.tensor([11, 4]))
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model.head(model.body(tokens(), seeds=seeds, reverse=reverse), tokens().roll(-1, 1))
    loss.backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(grads) == len(list(model.parameters()))
    return loss, grads


def check_equal_to_ordinary_autograd(config: ReformerConfig, precision: str) -> None:
    """The reversible pass gives the bits of reverse=False. precision: fp32, bf16 or autocast."""
    torch.manual_seed(0)
    model = Reformer(dataclasses.replace(config, depth=6))
    if precision == "bf16":
        model = model.bfloat16()
    loss, grads = loss_and_gradients(model, reverse=True, autocast=precision == "autocast")
    expected_loss, expected = loss_and_gradients(model, reverse=False, autocast=precision == "autocast")
    assert torch.equal(loss, expected_loss)
    assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))
    assert all(grad.any() for grad in grads)


def check_one_gradient_for_each_parameter(config: ReformerConfig) -> None:
    """ZeRO 2 and 3 need that a backward pass accumulates into each parameter once."""
    model = Reformer(config)
    fired: list[int] = []
    for number, p in enumerate(model.parameters()):
        p.register_post_accumulate_grad_hook(lambda _, number=number: fired.append(number))
    loss_and_gradients(model, reverse=True)
    assert sorted(fired) == list(range(len(list(model.parameters()))))


def check_function_of_weights_tokens_and_seeds(config: ReformerConfig) -> None:
    """Neither the default generator nor the place in the batch matters."""
    model = Reformer(config)
    state = torch.get_rng_state()
    logits = model(tokens(), seeds=Seeds(1, 2))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(model(tokens(), seeds=Seeds(1, 2)), logits)
    assert not torch.equal(model(tokens(), seeds=Seeds(1, 3)), logits)
    swapped = model(tokens().flip(0), seeds=Seeds(1, 2, torch.tensor([1, 0])))
    torch.testing.assert_close(swapped.flip(0), logits, atol=1e-4, rtol=1e-4)


def check_padding_changes_nothing(config: ReformerConfig, *, any_length: bool) -> None:
    """The tokens of the padding do not matter. With any_length, removing the padding does not matter either."""
    model = Reformer(config).eval()
    mask = torch.arange(LENGTH) < torch.tensor([[LENGTH], [25]])
    x = tokens().masked_fill(~mask, 0)
    other = tokens(seed=1).where(~mask, x)
    logits, others = model(x, mask=mask), model(other, mask=mask)
    torch.testing.assert_close(others[mask], logits[mask], atol=1e-4, rtol=1e-4)
    if any_length:
        torch.testing.assert_close(logits[1:, :25], model(x[1:, :25]), atol=1e-4, rtol=1e-4)
