"""The reversible stack equals the same arithmetic through ordinary autograd (reverse=False) to the last bit."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from megabase.models import LocalConfig, LSHConfig, Reformer, ReformerConfig, Seeds, streams
from megabase.models.attention import by_heads
from megabase.models.call import Call
from megabase.models.config import FeedForwardConfig
from megabase.models.reversible import Block, ReversibleStack
from megabase.models.streams import LIMIT, SCALE, FixedPoint, decoded
from tests.models.backward import assert_same_bits, gradients, kept_for_backward
from tests.quick import slow

TINY = ReformerConfig(
    vocab_size=9,
    dim=16,
    depth=1,
    heads=2,
    layers=["local", "lsh", "full"],
    conv=3,
    dropout=0.1,
    attention_dropout=0.1,
    loss_chunk=17,
    lsh=LSHConfig(rounds=2, chunk_length=8, n_buckets=4),
    local=LocalConfig(window=8),
    feedforward=FeedForwardConfig(mult=2.0),
)


def batch(length: int = 40) -> tuple[Tensor, Tensor, Seeds]:
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(5, 9, (2, length), generator=generator)
    return tokens, tokens.roll(-1, 1), Seeds(run=3, step=5, samples=torch.tensor([11, 4]))


def run(model: Reformer, *, reverse: bool) -> Tensor:
    tokens, labels, seeds = batch()
    return model.head(model.body(tokens, seeds=seeds, reverse=reverse), labels)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "autocast"])
@pytest.mark.parametrize("depth", [1, 12, slow(48)])
def test_equals_ordinary_autograd_bit_for_bit(depth, precision, causal):
    torch.manual_seed(0)
    model = Reformer(dataclasses.replace(TINY, depth=depth, causal=causal))
    if precision == "bf16":
        model = model.bfloat16()
    results = []
    for reverse in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            loss = run(model, reverse=reverse)
        loss.backward()
        results.append((loss, gradients(model)))
    (loss, found), (expected_loss, expected) = results
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected_loss)
    assert_same_bits(found, expected)
    assert all(grad.abs().sum() > 0 for grad in found.values())


@pytest.mark.parametrize("activation", ["relu", "swiglu"])
@pytest.mark.parametrize("options", [{"norm": "rms"}, {"tie_embeddings": True}, {"positions": "axial"}])
def test_other_settings_equal_ordinary_autograd(options, activation):
    torch.manual_seed(0)
    feedforward = FeedForwardConfig(mult=2.0, activation=activation, chunk=13)
    model = Reformer(dataclasses.replace(TINY, depth=3, max_length=64, feedforward=feedforward, **options))
    run(model, reverse=True).backward()
    found = gradients(model)
    run(model, reverse=False).backward()
    assert_same_bits(found, gradients(model))


def test_backward_under_autocast_finds_every_gradient():
    """Autocast caches a weight that it casts under no_grad; the backward pass must not use that copy."""
    torch.manual_seed(0)
    model = Reformer(dataclasses.replace(TINY, depth=3))
    results = []
    for reverse in (True, False):
        with torch.autocast("cpu", torch.bfloat16):
            run(model, reverse=reverse).backward()
        results.append(gradients(model))
    assert_same_bits(*results)


def test_two_forward_passes_may_precede_the_backward_passes():
    torch.manual_seed(0)
    model = Reformer(dataclasses.replace(TINY, depth=3))
    tokens, labels, _ = batch()
    separate: list[dict[str, Tensor]] = []
    for step in (1, 2):
        model.loss(tokens, labels, seeds=Seeds(step=step)).backward()
        separate.append(gradients(model))
    losses = [model.loss(tokens, labels, seeds=Seeds(step=step)) for step in (1, 2)]
    losses[1].backward()
    losses[0].backward()
    assert_same_bits(gradients(model), {name: separate[1][name] + grad for name, grad in separate[0].items()})


def test_a_second_backward_pass_through_one_graph_gives_the_same_bits():
    model = Reformer(dataclasses.replace(TINY, depth=2))
    loss = run(model, reverse=True)
    loss.backward(retain_graph=True)
    first = gradients(model)
    loss.backward()
    assert_same_bits(first, gradients(model))


def test_a_backward_pass_that_ends_before_the_stack_leaves_no_gradients_in_the_streams():
    model = Reformer(dataclasses.replace(TINY, depth=2))
    run(model, reverse=True).backward()
    expected = gradients(model)
    loss = run(model, reverse=True)
    torch.autograd.grad(loss, model.body.norm.weight, retain_graph=True)
    loss.backward()
    assert_same_bits(gradients(model), expected)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_streams_in_host_memory_give_the_same_bits(dropout, monkeypatch):
    """On a CPU the device is the host too: this is the path by pieces, with copies that nothing shares."""
    torch.manual_seed(0)
    model = Reformer(dataclasses.replace(TINY, depth=3, dropout=dropout))
    monkeypatch.setitem(by_heads.LIMIT, "cpu", 2 * 40 * 16 // 2)
    expected_loss = run(model, reverse=True)
    expected_loss.backward()
    expected = gradients(model)
    for module in (streams, by_heads):
        monkeypatch.setattr(module, "in_host_memory", lambda x, device: True)
    monkeypatch.setattr(streams, "MOVED", 100)
    model.body.stack.offload = True
    loss = run(model, reverse=True)
    loss.backward(retain_graph=True)
    assert torch.equal(loss, expected_loss)
    assert_same_bits(gradients(model), expected)
    loss.backward()
    assert_same_bits(gradients(model), expected)


def test_eval_mode_has_gradients_and_calling_eval_before_backward_changes_nothing():
    torch.manual_seed(0)
    model = Reformer(dataclasses.replace(TINY, depth=3)).eval()
    run(model, reverse=True).backward()
    found = gradients(model)
    run(model, reverse=False).backward()
    assert_same_bits(found, gradients(model))

    run(model.train(), reverse=True).backward()
    expected = gradients(model)
    loss = run(model, reverse=True)
    model.eval()
    loss.backward()
    assert_same_bits(expected, gradients(model))


def test_no_grad_gives_the_same_loss_and_no_graph():
    model = Reformer(dataclasses.replace(TINY, depth=3))
    with torch.no_grad():
        loss = run(model, reverse=True)
    assert not loss.requires_grad
    assert torch.equal(loss, run(model, reverse=True))


def test_frozen_embedding_still_trains_the_stack():
    model = Reformer(dataclasses.replace(TINY, depth=2))
    model.body.embedding.requires_grad_(False)
    run(model, reverse=True).backward()
    assert all(p.grad is not None for p in model.body.stack.parameters())


def test_autograd_grad_for_parameters_is_refused():
    model = Reformer(dataclasses.replace(TINY, depth=1))
    loss = run(model, reverse=True)
    with pytest.raises(RuntimeError, match=r"loss\.backward"):
        torch.autograd.grad(loss, list(model.parameters()))
    with pytest.raises(RuntimeError, match="not have been used in the graph"):
        torch.autograd.grad(run(model, reverse=True), list(model.body.stack.parameters()))
    with pytest.raises(RuntimeError, match=r"loss\.backward"):
        run(model, reverse=True).backward(inputs=[model.body.embedding.tokens.weight])
    assert all(p.grad is None for p in model.parameters())


def test_a_frozen_stack_passes_gradients_to_its_input():
    model = Reformer(dataclasses.replace(TINY, depth=2)).eval()
    model.body.stack.requires_grad_(False)
    weight = model.body.embedding.tokens.weight
    grads = [torch.autograd.grad(run(model, reverse=r), weight)[0] for r in (True, False)]
    assert torch.equal(*grads)


def test_hooks_of_parameters_fire_once_each():
    model = Reformer(dataclasses.replace(TINY, depth=3, feedforward=FeedForwardConfig(chunk=7)))
    fired: list[str] = []

    def watch(name: str) -> Callable[[Tensor], None]:
        return lambda _: fired.append(name)

    for name, p in model.named_parameters():
        p.register_post_accumulate_grad_hook(watch(name))
    run(model, reverse=True).backward()
    assert sorted(fired) == sorted(name for name, _ in model.named_parameters())


def saved_elements(model: Reformer, *, reverse: bool) -> int:
    return sum(x.numel() for x in kept_for_backward(model, lambda: run(model, reverse=reverse)))


def test_memory_kept_for_backward_does_not_grow_with_depth():
    models = [Reformer(dataclasses.replace(TINY, depth=depth)) for depth in (1, 6, 24)]
    kept = [saved_elements(model, reverse=True) for model in models]
    assert kept[0] == kept[1] == kept[2]
    assert saved_elements(models[1], reverse=False) > 10 * kept[1]


class Scaled(nn.Module):
    """A branch with one weight."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))

    def forward(self, x: Tensor, call: Call) -> Tensor:
        return self.weight * decoded(x, call.source).sin()


def test_inversion_is_exact_even_where_addition_wraps():
    torch.manual_seed(0)
    stack = ReversibleStack([Block(Scaled(30000.0), Scaled(-30000.0)) for _ in range(6)])
    x = torch.randn(2, 5, 4)
    one = two = start = FixedPoint.encode(x)
    with torch.no_grad():
        for block in stack.blocks:
            one = one + FixedPoint.encode(block.f(FixedPoint.decode(two), Call()))
            two = two + FixedPoint.encode(block.g(FixedPoint.decode(one), Call()))
        for block in reversed(stack.blocks):
            two = two - FixedPoint.encode(block.g(FixedPoint.decode(one), Call()))
            one = one - FixedPoint.encode(block.f(FixedPoint.decode(two), Call()))
    assert torch.equal(one, start)
    assert torch.equal(two, start)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), LIMIT, -40000.0])
@pytest.mark.parametrize("reverse", [True, False])
def test_the_output_is_nan_if_a_number_leaves_the_range(value, reverse):
    stack = ReversibleStack([Block(Scaled(value), Scaled(0.0))])
    out = stack(torch.full((1, 2, 3), torch.pi / 2), Call(), reverse=reverse)
    assert out.isnan().all()


def test_the_output_is_finite_within_the_range():
    stack = ReversibleStack([Block(Scaled(LIMIT - 10), Scaled(0.0))])
    assert stack(torch.full((1, 2, 3), 1.5), Call()).isfinite().all()


def test_rounding_is_to_the_nearest_unit_and_saturates():
    unit = 1 / SCALE
    x = torch.tensor([0.4 * unit, 0.6 * unit, -0.6 * unit, 1.0, 1e9, -1e9])
    assert FixedPoint.encode(x).tolist() == [0, 1, -1, 65536, 2147483520, -2147483648]
    stream = torch.randint(-(2**23), 2**23, (1000,), dtype=torch.int32)
    assert torch.equal(FixedPoint.encode(FixedPoint.decode(stream)), stream)


def test_float_residual_is_close_to_ordinary_autograd_but_not_exact():
    torch.manual_seed(0)
    model = Reformer(dataclasses.replace(TINY, depth=4, residual="float", layers=["local"]))
    run(model, reverse=True).backward()
    found = gradients(model)
    run(model, reverse=False).backward()
    expected = gradients(model)
    for name, grad in found.items():
        torch.testing.assert_close(
            grad, expected[name], atol=1e-4 * expected[name].abs().max().item(), rtol=1e-3
        )
    assert any(not torch.equal(grad, expected[name]) for name, grad in found.items())
