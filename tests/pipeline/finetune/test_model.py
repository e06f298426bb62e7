"""What is trained of a model, and what it computes."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from megabase.models import ReformerConfig, Seeds
from megabase.models.reformer import Body
from megabase.pipeline.finetune.examples import Problem
from megabase.pipeline.finetune.model import (
    FULL,
    LAST,
    LORA,
    MEAN,
    MODES,
    PROBE,
    FineTuned,
    Method,
    freeze,
    prepared,
)
from tests.pipeline.finetune.conftest import CONFIG

EACH_MODE = [pytest.param(mode, marks=pytest.mark.slow if mode == LORA else ()) for mode in MODES]
TWO = Problem(("a", "b"))
TOKENS = torch.randint(5, 9, (3, 32), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
TOKENS[:, 0] = 1
LENGTHS = torch.tensor([32, 20, 2])


def body_of(config: ReformerConfig = CONFIG) -> Body:
    torch.manual_seed(0)
    return Body(config)


def tuned(mode: str, problem: Problem = TWO, pool: str = MEAN, config: ReformerConfig = CONFIG) -> FineTuned:
    method, body = Method(mode, pool, 4), body_of(config)
    if mode != FULL:
        body = prepared(body, method, 1)
    torch.manual_seed(2)
    return FineTuned(body, problem, method)


def stirred(model: FineTuned) -> FineTuned:
    """Low-rank additions that add something."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.2)
    return model


@pytest.mark.parametrize("mode", EACH_MODE)
def test_only_what_the_mode_names_is_trained_and_saved(mode: str) -> None:
    model = tuned(mode)
    names = {name for name, _ in model.named_parameters()}
    assert names == set(model.state_dict())
    assert {"head.weight", "head.bias"} <= names
    of_body = names - {"head.weight", "head.bias"}
    if mode == PROBE:
        assert not of_body
    elif mode == LORA:
        assert all("lora_" in name for name in of_body)
        # Two projections of each low-rank addition: query, key, value and output; query-keys are shared in LSH layers.
        assert len(of_body) == 2 * (4 + 3)
    else:
        assert of_body == {f"body.{name}" for name, _ in body_of().named_parameters()}
    before = {name: weight.clone() for name, weight in model.body.named_buffers()}
    adam = torch.optim.AdamW(model.parameters(), lr=0.1)
    outputs = model(TOKENS, LENGTHS, Seeds())
    model.loss(outputs, torch.tensor([0, 1, 0]))[0].backward()
    assert all(weight.grad is not None for weight in model.parameters())
    adam.step()
    assert all(torch.equal(weight, before[name]) for name, weight in model.body.named_buffers())


@pytest.mark.parametrize("mode", EACH_MODE)
def test_at_the_start_every_mode_is_the_pretrained_body(mode: str) -> None:
    with torch.no_grad():
        assert torch.equal(
            tuned(mode).eval()(TOKENS, LENGTHS, Seeds()), tuned(FULL).eval()(TOKENS, LENGTHS, Seeds())
        )


@pytest.mark.slow  # peft takes seconds to import
def test_gradients_of_low_rank_additions_are_those_of_plain_autograd() -> None:
    def gradients(reverse: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model = stirred(tuned(LORA))
        hidden = model.body(TOKENS.long(), seeds=Seeds(run=5), reverse=reverse)
        hidden.square().sum().backward()
        return hidden.detach(), {n: w.grad for n, w in model.body.named_parameters() if w.grad is not None}

    hidden, found = gradients(True)
    expected_hidden, expected = gradients(False)
    assert torch.equal(hidden, expected_hidden)
    assert len(found) == 14 and found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) and found[name].abs().max() > 0 for name in found)


@pytest.mark.slow
def test_inversion_stays_exact_with_low_rank_additions(monkeypatch: pytest.MonkeyPatch) -> None:
    from megabase.models import reversible
    from megabase.models.call import Call
    from megabase.models.streams import FixedPoint

    model = stirred(tuned(LORA))
    rebuilt: list[torch.Tensor] = []
    invert = reversible._invert

    def spy(ctx: object, branch: object, after: torch.Tensor, *others: object) -> None:
        invert(ctx, branch, after, *others)  # type: ignore[arg-type]
        rebuilt.append(after.clone())

    monkeypatch.setattr(reversible, "_invert", spy)
    model(TOKENS, LENGTHS, Seeds()).sum().backward()
    start = FixedPoint.encode(model.body.embedding(TOKENS.long(), Call()))
    assert torch.equal(rebuilt[-1], start) and torch.equal(rebuilt[-2], start)


@pytest.mark.parametrize("pool", [MEAN, LAST])
@pytest.mark.parametrize("causal", [True, False])
def test_padding_and_neighbours_change_nothing(pool: str, causal: bool) -> None:
    config = copy.deepcopy(CONFIG)
    config.causal = causal
    model = tuned(PROBE, TWO, pool, config).eval()
    together = model(TOKENS, LENGTHS, Seeds())
    changed = TOKENS.clone()
    changed[1, 20:] = 0
    changed[2, 2:] = 7
    assert torch.equal(model(changed, LENGTHS, Seeds()), together) or not causal
    torch.testing.assert_close(model(changed, LENGTHS, Seeds()), together)
    if causal:
        torch.testing.assert_close(model(TOKENS[1:2, :20], LENGTHS[1:2], Seeds()), together[1:2])


def test_pooling_is_of_the_letters() -> None:
    hidden = body_of()(TOKENS.long(), seeds=Seeds())
    for pool, wanted in ((LAST, hidden[1, 19]), (MEAN, hidden[1, 1:20].mean(dim=0))):
        model = tuned(PROBE, TWO, pool).eval()
        torch.testing.assert_close(
            model(TOKENS, LENGTHS, Seeds())[1], model.head(wanted), rtol=1e-5, atol=1e-6
        )


def test_losses_and_predictions() -> None:
    model = tuned(PROBE)
    outputs = torch.tensor([[2.0, 0.0], [0.0, 1.0], [5.0, 5.0]])
    total, count, correct = model.loss(outputs, torch.tensor([0, 0, -100]))
    wanted = np.log1p(np.exp(-2)) + np.log1p(np.exp(1))
    assert (total.item(), count.item(), correct.item()) == (pytest.approx(wanted, rel=1e-6), 2, 1)
    assert torch.allclose(model.predict(TOKENS, LENGTHS, Seeds()).sum(dim=1), torch.ones(3))
    numbers = tuned(PROBE, Problem((), mean=10.0, scale=2.0))
    labels = torch.tensor([1.0, 3.0, float("nan")]).view(torch.int32)
    total, count, _ = numbers.loss(torch.tensor([[0.0], [1.0], [9.0]]), labels)
    assert (total.item(), count.item()) == (2.5, 2)
    found = numbers.predict(TOKENS, LENGTHS, Seeds())
    torch.testing.assert_close(found, numbers(TOKENS, LENGTHS, Seeds()) * 2 + 10)


def test_frozen_weights_are_buffers() -> None:
    body = body_of()
    wanted = {name: weight.detach().clone() for name, weight in body.named_parameters()}
    frozen = freeze(body)
    assert not list(frozen.parameters()) and not frozen.state_dict()
    found = dict(frozen.named_buffers())
    assert all(torch.equal(found[name], weight) for name, weight in wanted.items())
