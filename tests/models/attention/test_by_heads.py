"""Attention some heads at a time equals attention of all heads at once, up to the rounding of the sum over groups."""

import dataclasses

import pytest
import torch
from torch import Tensor

from megabase.models import (
    LinformerConfig,
    LocalConfig,
    LSHConfig,
    PerformerConfig,
    Reformer,
    ReformerConfig,
    Seeds,
)
from megabase.models.attention import by_heads
from megabase.models.attention.statistics import lsh_statistics
from megabase.models.call import Call
from megabase.models.sequence import Loopback, Part
from tests.models.backward import assert_same_bits, gradients

CONFIG = ReformerConfig(
    vocab_size=9,
    dim=24,
    depth=4,
    heads=6,
    layers=["local", "lsh", "full", "performer"],
    conv=3,
    max_length=40,
    lsh=LSHConfig(rounds=2, chunk_length=8, n_buckets=4),
    local=LocalConfig(window=8),
    performer=PerformerConfig(features=16),
    linformer=LinformerConfig(size=4),
)


@pytest.fixture
def three_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of the six heads in a group, and projections of few positions at a time."""
    monkeypatch.setitem(by_heads.LIMIT, "cpu", 2 * 40 * 24 // 3)
    monkeypatch.setitem(by_heads.ROWS, "cpu", 11)


def losses_and_gradients(model: Reformer, *, reverse: bool = True) -> tuple[Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(5, 9, (2, 40), generator=generator)
    mask = torch.arange(40) < torch.tensor([[40], [31]])
    seeds = Seeds(run=3, step=5, samples=torch.tensor([11, 4]))
    hidden = model.body(tokens, seeds=seeds, mask=mask, reverse=reverse)
    loss = model.head(hidden, tokens.roll(-1, 1).where(mask, -100))
    loss.backward()
    return loss.detach(), gradients(model)


def build(**changes: object) -> Reformer:
    torch.manual_seed(0)
    return Reformer(dataclasses.replace(CONFIG, **changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dropout": 0.1, "attention_dropout": 0.1, "layers": ["local", "lsh"]},
        {"causal": False},
        {"conv": 0},
    ],
)
def test_groups_equal_all_heads_at_once(changes, request):
    if changes.get("causal") is False:
        changes = changes | {"layers": ["local", "lsh", "full", "linformer"]}
    model = build(**changes).double() if not changes else build(**changes)
    expected_loss, expected = losses_and_gradients(model)
    request.getfixturevalue("three_groups")
    loss, found = losses_and_gradients(model)
    torch.testing.assert_close(loss, expected_loss)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=2e-3, atol=2e-4, msg=name)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "autocast"])
@pytest.mark.usefixtures("three_groups")
def test_reversible_equals_ordinary_bit_for_bit(precision):
    model = build(dropout=0.1)
    if precision == "bf16":
        model = model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        (loss, found), (expected_loss, expected) = (
            losses_and_gradients(model, reverse=reverse) for reverse in (True, False)
        )
    assert torch.equal(loss, expected_loss)
    assert_same_bits(found, expected)


def test_what_is_in_a_group(monkeypatch):
    model = build()
    layer, x = model.body.stack.blocks[1].f.attention, torch.zeros(2, 40, 24)
    assert [group.projected for group in by_heads.head_groups(layer, x, Call())] == [None]
    monkeypatch.setitem(by_heads.LIMIT, "cpu", 1)
    groups = by_heads.head_groups(layer, x, Call())
    assert [group.projected.tolist() for group in groups] == [[0], [1], [2], [3], [4], [5]]
    assert [group.of_process for group in groups] == [slice(i, i + 1) for i in range(6)]
    # The second of two processes attends with heads 3 to 5; of each group it projects those of both.
    part = Part(1, 2, 80, Loopback())
    groups = by_heads.head_groups(layer, x, Call(part=part))
    assert [group.projected.tolist() for group in groups] == [[0, 3], [1, 4], [2, 5]]
    assert [group.of_process for group in groups] == [slice(i, i + 1) for i in (3, 4, 5)]
    # Weights that are not those of plain linear maps are not cut.
    layer.value = torch.nn.Sequential(layer.value)
    assert len(by_heads.head_groups(layer, x, Call())) == 1


@pytest.mark.usefixtures("three_groups")
def test_statistics_are_those_of_the_last_group():
    model = build(layers=["lsh"], depth=1)
    with lsh_statistics(model) as found:
        losses_and_gradients(model)
    assert 0 < found[0].balance <= 1
