"""How tokens are drawn from a state; test_reading.py has the state itself."""

import dataclasses

import pytest
import torch
from torch import Tensor

from megabase.models import LSHConfig, Seeds
from megabase.models.chance import Purpose
from megabase.models.generation import Sampling, generate
from tests.models.test_reading import SMALL, build, tokens


@pytest.mark.parametrize(
    ("values_ahead", "expected"),
    [
        (True, ["6768153122517158824674401536338601403358", "3388280051378007422407677045343286128370"]),
        (False, ["6768163122517158824675400536338601403358", "3388280051378007422407677045343286128370"]),
    ],
)
def test_a_seed_draws_the_tokens_of_earlier_versions(values_ahead, expected):
    model = build(dataclasses.replace(SMALL, values_ahead=values_ahead))
    found = generate(model, tokens(length=11), 40, seed=4)
    assert ["".join(map(str, row)) for row in found.tolist()] == expected


def test_temperature_zero_takes_the_likeliest_token():
    model = build(SMALL)
    prompt = tokens(length=11)
    found = generate(model, prompt, 30, temperature=0.0, seed=4)
    assert found.shape == (2, 30)
    for i in range(30):
        prefix = torch.cat((prompt, found[:, :i]), dim=1)
        assert torch.equal(model(prefix, seeds=Seeds(run=4))[:, -1].argmax(-1), found[:, i])
    assert torch.equal(generate(model, prompt, 30, top_k=1, seed=4), found)


@pytest.mark.slow
def test_generation_is_a_function_of_its_seed_and_continues_from_its_tokens():
    model = build(SMALL)
    prompt = tokens(length=11)
    state = torch.get_rng_state()
    found = generate(model, prompt, 40, seed=4)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(generate(model, prompt, 40, seed=4), found)
    assert not torch.equal(generate(model, prompt, 40, seed=5), found)
    longer = torch.cat((prompt, found[:, :15]), dim=1)
    assert torch.equal(generate(model, longer, 25, seed=4), found[:, 15:])
    assert torch.equal(generate(model, prompt[:1], 40, seed=4), found[:1])
    rows = generate(model, prompt[:1].expand(2, -1), 40, seed=4)
    assert not torch.equal(rows[0], rows[1])


def test_drawing_follows_the_distribution():
    n = 40_000
    logits = torch.tensor([0.0, 1.0, -torch.inf, 2.0, -1.0])
    keys = Seeds().keys(Purpose.SAMPLING, 0, n, logits.device)

    def shares(**options) -> Tensor:
        drawn = Sampling(**options).draw(logits.expand(n, 5), keys, 7)
        return torch.bincount(drawn, minlength=5) / n

    def assert_shares(found: Tensor, expected: Tensor) -> None:
        assert (found - expected).abs().max() < 4 * 0.5 * n**-0.5
        assert torch.equal(found > 0, expected > 0)

    assert_shares(shares(), logits.softmax(0))
    assert_shares(shares(temperature=0.5), (logits / 0.5).softmax(0))
    two = torch.tensor([-torch.inf, 1.0, -torch.inf, 2.0, -torch.inf])
    assert_shares(shares(top_k=2), two.softmax(0))
    assert_shares(shares(top_k=100), logits.softmax(0))
    assert_shares(shares(allowed=[1, 3]), two.softmax(0))
    assert_shares(shares(allowed=[4]), torch.tensor([0.0, 0, 0, 0, 1]))
    # Probabilities in this order: 3, 1, 0, 4. The first three are what adds up to 0.9.
    three = logits.masked_fill(torch.arange(5) == 4, -torch.inf)
    assert_shares(shares(top_p=0.9), three.softmax(0))
    assert_shares(shares(top_p=1.0), logits.softmax(0))
    assert_shares(shares(top_p=1e-9), torch.tensor([0.0, 0, 0, 1, 0]))
    assert_shares(shares(top_p=0.7, allowed=[0, 1]), torch.tensor([0.0, 1, 0, 0, 0]))
    rows = (torch.arange(n)[:, None] % 2 == 0) | (
        torch.arange(5) == 4
    )  # every second row may draw token 4 only
    drawn = Sampling().draw(logits.expand(n, 5), keys, 7, rows)
    assert (drawn[1::2] == 4).all()
    assert torch.equal(drawn[::2], Sampling().draw(logits.expand(n, 5), keys, 7)[::2])
    assert_shares(shares(temperature=1e-320), torch.tensor([0.0, 0, 0, 1, 0]))
    # The positions of one sequence draw independently of each other.
    places = torch.stack([Sampling().draw(logits.expand(99, 5), keys[:99], p) for p in range(200)])
    assert_shares(torch.bincount(places.flatten(), minlength=5) / places.numel(), logits.softmax(0))


def test_generation_draws_allowed_tokens_only_and_repeats_stop():
    model = build(SMALL)
    prompt = tokens(batch=3, length=4)
    found = generate(model, prompt, 50, allowed=[5, 7])
    assert set(found.unique().tolist()) == {5, 7}
    stopped = generate(model, prompt, 50, allowed=[5, 7], stop=7)
    assert stopped.shape[1] == max((row == 7).nonzero()[0].item() for row in found) + 1
    for row, free in zip(stopped, found, strict=True):
        first = (free == 7).nonzero()[0].item()
        assert torch.equal(row[: first + 1], free[: first + 1])
        assert (row[first:] == 7).all()
    assert generate(model, prompt, 0).shape == (3, 0)


def test_logits_that_are_not_finite_are_refused():
    model = build(SMALL)
    with torch.no_grad():
        model.body.norm.weight[0] = torch.nan
    with pytest.raises(RuntimeError, match="not finite"):
        generate(model, tokens(length=3), 2)


def test_settings_of_lsh_do_not_matter_without_lsh_layers():
    model = build(dataclasses.replace(SMALL, layers=["local"], lsh=LSHConfig(attend="chunk")))
    assert generate(model, tokens(length=3), 2).shape == (2, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: generate(model, tokens(length=60), 10), "max_length=64"),
        (lambda model: generate(model, tokens(), 3, temperature=-1.0), "temperature=-1.0"),
        (lambda model: generate(model, tokens(), 3, top_k=0), "top_k=0"),
        (lambda model: generate(model, tokens(), 3, top_p=0.0), "top_p=0.0"),
        (lambda model: generate(model, tokens(), -3), "length=-3"),
        (lambda model: generate(model, tokens(), 3, allowed=[]), "allowed"),
        (lambda model: generate(model, tokens(), 3, allowed=[9]), "from 0 to 8"),
    ],
)
def test_arguments_that_cannot_work_are_refused(call, message):
    model = build(dataclasses.replace(SMALL, positions="learned", max_length=64))
    with pytest.raises(ValueError, match=message):
        call(model)
