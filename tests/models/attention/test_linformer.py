"""Linformer attention against its formula, and models with linformer layers."""

import dataclasses

import pytest
import torch
from torch import Tensor

from megabase.models import Reformer
from megabase.models.attention import linformer_attention
from megabase.models.attention.kernels.inputs import PairDropout
from megabase.models.attention.linformer import LinformerAttention
from megabase.models.call import Call
from megabase.models.config import ConfigError, LinformerConfig, PerformerConfig, ReformerConfig
from tests.models.attention import model_checks
from tests.quick import slow


def inputs(length: int = 12) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, length, 4, generator=generator, dtype=torch.float64) for _ in range(3)]


def projections(*shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(shape, generator=generator, dtype=torch.float64), torch.randn(
        shape, generator=generator, dtype=torch.float64
    )


def by_hand(q: Tensor, k: Tensor, v: Tensor, to_keys: Tensor, to_values: Tensor) -> Tensor:
    """The formula, for one sequence and one head at a time."""
    out = torch.empty_like(v)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            e, f = (x if x.dim() == 2 else x[h] for x in (to_keys, to_values))
            scores = q[b, h] @ (e @ k[b, h]).T / q.shape[-1] ** 0.5
            out[b, h] = scores.softmax(-1) @ (f @ v[b, h])
    return out


@pytest.mark.parametrize("shape", [(5, 12), (3, 5, 12)])
def test_equals_the_formula(shape):
    q, k, v = inputs()
    e, f = projections(*shape)
    torch.testing.assert_close(linformer_attention(q, k, v, e, f), by_hand(q, k, v, e, f))
    torch.testing.assert_close(linformer_attention(q, k, v, e), by_hand(q, k, v, e, e))


def test_as_many_slots_as_positions_can_be_full_attention():
    q, k, v = inputs()
    full = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(linformer_attention(q, k, v, torch.eye(12, dtype=torch.float64)), full)


@pytest.mark.parametrize("shared", [True, False])
def test_padding_adds_nothing_to_any_slot(shared):
    q, k, v = inputs()
    e, f = projections(5, 12)
    mask = torch.zeros(2, 12, dtype=torch.bool)
    mask[0, :7], mask[1, ::2] = True, True
    out = linformer_attention(q, k, v, e, None if shared else f, mask=mask)
    assert not out.transpose(1, 2)[~mask].any()
    for i, real in enumerate(mask):
        alone = (x[i : i + 1, :, real] for x in (q, k, v))
        expected = by_hand(*alone, e[:, real], (e if shared else f)[:, real])
        torch.testing.assert_close(out[i : i + 1, :, real], expected)


def test_dropout_falls_on_pairs_of_query_and_slot():
    q, k, v = inputs()
    e, f = projections(5, 12)
    dropout = PairDropout(0.4, torch.arange(6) * 12345678901)
    scale = dropout.scale(torch.arange(6)[:, None, None], torch.arange(12)[:, None], torch.arange(5))
    weights = (q @ (e @ k).mT / 2).softmax(-1) * scale.view(2, 3, 12, 5)
    torch.testing.assert_close(
        linformer_attention(q, k, v, e, f, dropout=dropout), weights @ (f @ v), atol=1e-6, rtol=1e-6
    )


def test_gradients_equal_finite_differences():
    q, k, v = (x[:, :, :6].clone().requires_grad_() for x in inputs())
    e, f = (x.requires_grad_() for x in projections(3, 2, 6))
    mask = torch.arange(6) < torch.tensor([[6], [4]])
    assert torch.autograd.gradcheck(
        lambda *tensors: linformer_attention(*tensors, mask=mask), (q, k, v, e, f)
    )


def test_another_length_is_refused():
    q, k, v = inputs(length=11)
    e, _ = projections(5, 12)
    with pytest.raises(ConfigError, match=r"a sequence of 11 tokens .* to_keys made for 12"):
        linformer_attention(q, k, v, e)
    with pytest.raises(ConfigError, match="to_values made for 12"):
        linformer_attention(q, k, v, e[:, :11], e)


@pytest.mark.parametrize(
    ("share", "weights"), [("none", 2 * 2 * 5 * 12), ("heads", 2 * 5 * 12), ("keyvalue", 5 * 12)]
)
def test_shared_projections_equal_the_formula(share, weights):
    config = ReformerConfig(
        vocab_size=9,
        dim=16,
        heads=2,
        layers=["linformer"],
        causal=False,
        max_length=12,
        linformer=LinformerConfig(size=5, share=share),
    )
    config.validate(12)
    torch.manual_seed(0)
    layer = LinformerAttention(config, 0)
    assert sum(p.numel() for p in layer.parameters()) == 4 * 16 * 16 + weights
    x = torch.randn(3, 12, 16)
    y = layer(x, x, Call())
    q, k, v = (p(x).view(3, 12, 2, 8).transpose(1, 2) for p in (layer.query, layer.key, layer.value))
    to_values = layer.to_keys if layer.to_values is None else layer.to_values
    expected = layer.output(by_hand(q, k, v, layer.to_keys, to_values).transpose(1, 2).flatten(2))
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)


# In a model


LENGTH = model_checks.LENGTH
MODEL = ReformerConfig(
    vocab_size=9,
    dim=16,
    depth=3,
    heads=2,
    layers=["linformer"],
    causal=False,
    max_length=LENGTH,
    conv=3,
    dropout=0.1,
    attention_dropout=0.1,
    linformer=LinformerConfig(size=6),
)
CONFIGS = {
    "heads": MODEL,
    "keyvalue": dataclasses.replace(MODEL, linformer=LinformerConfig(6, "keyvalue")),
    "none": dataclasses.replace(MODEL, linformer=LinformerConfig(6, "none")),
    "with other kinds": dataclasses.replace(
        MODEL,
        layers=["performer", "local", "linformer"],
        attention_dropout=0.0,
        performer=PerformerConfig(features=12),
    ),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


@every_config
@pytest.mark.parametrize("precision", [slow("fp32"), slow("bf16"), "autocast"])
def test_the_reversible_pass_equals_ordinary_autograd(config, precision):
    model_checks.check_equal_to_ordinary_autograd(config, precision)


@every_config
def test_each_parameter_gets_one_gradient(config):
    model_checks.check_one_gradient_for_each_parameter(config)


@every_config
def test_the_pass_is_a_function_of_weights_tokens_and_seeds(config):
    model_checks.check_function_of_weights_tokens_and_seeds(config)


@every_config
def test_padding_changes_nothing_for_real_tokens(config):
    model_checks.check_padding_changes_nothing(config, any_length=False)


def test_a_model_takes_sequences_of_max_length_only():
    model = Reformer(MODEL)
    for length in (LENGTH - 1, LENGTH + 1):
        with pytest.raises(ConfigError, match=f"{length} tokens do not fit linformer.*max_length=40"):
            model(torch.full((1, length), 5))
