"""Performer and Linformer layers inside the model: the laws that every kind of layer obeys."""

import dataclasses

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megabase.models import (
    ConfigError,
    LinformerConfig,
    LocalConfig,
    PerformerConfig,
    Reformer,
    ReformerConfig,
    Seeds,
)
from megabase.models.flops import flops_per_token, keys_per_query

LENGTH = 40
PERFORMER = ReformerConfig(
    vocab_size=9,
    dim=16,
    depth=3,
    heads=2,
    layers=["performer"],
    conv=3,
    dropout=0.1,
    performer=PerformerConfig(features=12),
)
LINFORMER = dataclasses.replace(
    PERFORMER,
    layers=["linformer"],
    causal=False,
    max_length=LENGTH,
    attention_dropout=0.1,
    linformer=LinformerConfig(size=6),
)
CONFIGS = {
    "performer": PERFORMER,
    "performer, both sides": dataclasses.replace(PERFORMER, causal=False),
    "linformer": LINFORMER,
    "linformer, keyvalue": dataclasses.replace(LINFORMER, linformer=LinformerConfig(6, "keyvalue")),
    "linformer, none": dataclasses.replace(LINFORMER, linformer=LinformerConfig(6, "none")),
    "all": dataclasses.replace(LINFORMER, layers=["performer", "local", "linformer"], attention_dropout=0.0),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


def tokens(seed: int = 0, batch: int = 2) -> Tensor:
    return torch.randint(5, 9, (batch, LENGTH), generator=torch.Generator().manual_seed(seed))


def gradients(model: Reformer, *, reverse: bool, autocast: bool = False) -> tuple[Tensor, list[Tensor]]:
    """Loss, and the gradient of every parameter."""
    seeds = Seeds(run=3, step=5, samples=torch.tensor([11, 4]))
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model.head(model.body(tokens(), seeds=seeds, reverse=reverse), tokens().roll(-1, 1))
    loss.backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(grads) == len(list(model.parameters()))
    return loss, grads


@every_config
@pytest.mark.parametrize("precision", ["fp32", "bf16", "autocast"])
def test_reversible_equals_its_twin_bit_for_bit(config, precision):
    torch.manual_seed(0)
    model = Reformer(dataclasses.replace(config, depth=6))
    if precision == "bf16":
        model = model.bfloat16()
    loss, ours = gradients(model, reverse=True, autocast=precision == "autocast")
    twin_loss, twins = gradients(model, reverse=False, autocast=precision == "autocast")
    assert torch.equal(loss, twin_loss)
    assert all(torch.equal(a, b) for a, b in zip(ours, twins, strict=True))
    assert all(grad.any() for grad in ours)


@every_config
def test_gradients_of_parameters_come_once(config):
    """What ZeRO 2 and 3 need, projections that serve keys and values among them."""
    model = Reformer(config)
    fired: list[int] = []
    for number, p in enumerate(model.parameters()):
        p.register_post_accumulate_grad_hook(lambda _, number=number: fired.append(number))
    gradients(model, reverse=True)
    assert sorted(fired) == list(range(len(list(model.parameters()))))


@every_config
def test_the_pass_is_a_function_of_weights_tokens_and_seeds(config):
    model = Reformer(config)
    state = torch.get_rng_state()
    logits = model(tokens(), seeds=Seeds(1, 2))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(model(tokens(), seeds=Seeds(1, 2)), logits)
    assert not torch.equal(model(tokens(), seeds=Seeds(1, 3)), logits)
    swapped = model(tokens().flip(0), seeds=Seeds(1, 2, torch.tensor([1, 0])))
    torch.testing.assert_close(swapped.flip(0), logits, atol=1e-4, rtol=1e-4)


@every_config
def test_what_padding_holds_changes_nothing(config):
    model = Reformer(config).eval()
    mask = torch.arange(LENGTH) < torch.tensor([[LENGTH], [25]])
    x = tokens().masked_fill(~mask, 0)
    other = tokens(seed=1).where(~mask, x)
    ours, others = model(x, mask=mask), model(other, mask=mask)
    torch.testing.assert_close(others[mask], ours[mask], atol=1e-4, rtol=1e-4)
    if "linformer" not in config.layers:
        torch.testing.assert_close(ours[1:, :25], model(x[1:, :25]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("positions", ["rotary", "none"])
def test_performer_is_causal(positions):
    model = Reformer(dataclasses.replace(PERFORMER, positions=positions)).eval()
    x = tokens()
    changed = torch.cat((x[:, :30], tokens(seed=1)[:, 30:]), dim=1)
    logits = model(x)
    for other in (changed, x[:, :30]):
        torch.testing.assert_close(model(other)[:, :30], logits[:, :30], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(model(changed)[:, 30:], logits[:, 30:], atol=1e-2)


@pytest.mark.parametrize(
    "name", ["performer, both sides", "linformer", "linformer, keyvalue", "linformer, none"]
)
def test_flops_equal_those_torch_counts(name):
    config = dataclasses.replace(CONFIGS[name], conv=0, positions="none")
    model = Reformer(config).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(tokens(batch=1))
    assert counter.get_total_flops() == LENGTH * flops_per_token(config, LENGTH)


def test_flops_do_not_grow_with_length():
    assert keys_per_query(PERFORMER, "performer", 10**6) == 12
    assert keys_per_query(LINFORMER, "linformer", 10**6) == 6
    assert flops_per_token(PERFORMER, 10**6) == flops_per_token(PERFORMER, 10)
    causal, both = PERFORMER, dataclasses.replace(PERFORMER, causal=False)
    assert flops_per_token(causal, 10) == flops_per_token(both, 10)


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (LINFORMER, {"causal": True}, "mix all positions.*set model.causal=False"),
        (LINFORMER, {"max_length": None}, "model.max_length is not set: set it"),
        (LINFORMER, {"linformer": LinformerConfig(size=0)}, "linformer.size=0"),
        (LINFORMER, {"linformer": LinformerConfig(share="head")}, "did you mean 'heads'"),
        (LINFORMER, {"conv": 0}, "rotary does nothing"),
        (PERFORMER, {"performer": PerformerConfig(features=0)}, "performer.features=0"),
        (PERFORMER, {"performer": PerformerConfig(redraw_every=-1)}, "redraw_every=-1"),
        (PERFORMER, {"attention_dropout": 0.1}, "attention_dropout=0.1 cannot drop weights in performer"),
        (PERFORMER, {"layers": ["preformer"]}, "did you mean 'performer'"),
    ],
)
def test_settings_that_cannot_work_say_why_in_one_line(config, change, message):
    with pytest.raises(ConfigError, match=message) as error:
        Reformer(dataclasses.replace(config, **change))
    assert "\n" not in str(error.value)


def test_dropout_of_weights_beside_performer_layers():
    local = LocalConfig(window=8, dropout=0.2)
    Reformer(dataclasses.replace(PERFORMER, layers=["local", "performer"], local=local))


def test_linformer_takes_its_length_only():
    model = Reformer(LINFORMER)
    for length in (LENGTH - 1, LENGTH + 1):
        with pytest.raises(ConfigError, match=f"{length} tokens do not fit linformer.*max_length=40"):
            model(torch.full((1, length), 5))
