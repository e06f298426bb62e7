"""The whole model: shapes, causality, and what its output depends on."""

import copy
import dataclasses
import math

import pytest
import torch
from torch import Tensor

from megabase.models import (
    ConfigError,
    FeedForwardConfig,
    LocalConfig,
    LSHConfig,
    Reformer,
    ReformerConfig,
    Seeds,
)
from megabase.models.call import Call
from megabase.models.generation import read_block, start
from megabase.models.norm import Norm

SMALL = ReformerConfig(
    vocab_size=9,
    dim=16,
    depth=3,
    heads=2,
    layers=["local", "lsh", "full"],
    max_length=64,
    lsh=LSHConfig(rounds=2, chunk_length=8),
    local=LocalConfig(window=8),
)
POSITIONS = ["rotary", "axial", "learned", "none"]


def tokens(batch: int = 2, length: int = 50, seed: int = 0) -> Tensor:
    return torch.randint(5, 9, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_loss_is_the_cross_entropy_of_the_logits(positions, tied, biased):
    torch.manual_seed(0)
    model = Reformer(dataclasses.replace(SMALL, positions=positions, tie_embeddings=tied, head_bias=biased))
    if biased:
        torch.nn.init.normal_(model.head.bias, std=0.1)
    x, seeds = tokens(), Seeds(1, 2)
    labels = x.roll(-1, 1).masked_fill(torch.rand(2, 50) < 0.2, -100)
    weights = torch.rand(2, 50)
    logits = model(x, seeds=seeds)
    assert logits.shape == (2, 50, 9)
    nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    loss = model.loss(x, labels, seeds=seeds, weights=weights)
    torch.testing.assert_close(loss, (nats * weights.flatten()).sum())
    # Close to that of equal probabilities; less so with a tied head, which finds the token's own vector in the streams.
    uniform = (labels != -100).sum().item() * math.log(9) / 2
    assert loss.item() == pytest.approx(uniform, rel=0.5 if tied else 0.3)


@pytest.mark.parametrize("tied", [True, False])
def test_tokens_that_are_never_labels_start_with_probability_zero(tied):
    torch.manual_seed(0)
    model = Reformer(dataclasses.replace(SMALL, tie_embeddings=tied), first_label=5)
    shares = model(tokens()).softmax(-1)
    assert shares[..., :5].max() < 1e-6
    torch.testing.assert_close(shares[..., 5:].sum(-1), torch.ones(2, 50))
    without = Reformer(dataclasses.replace(SMALL, tie_embeddings=tied, head_bias=False), first_label=5)
    assert without.head.bias is None


@pytest.mark.parametrize("positions", POSITIONS)
def test_causal_logits_do_not_depend_on_later_tokens(positions):
    model = Reformer(dataclasses.replace(SMALL, positions=positions)).eval()
    x = tokens()
    changed = torch.cat((x[:, :30], tokens(seed=1)[:, 30:]), dim=1)
    logits = model(x)[:, :30]
    for other in (changed, x[:, :30]):
        torch.testing.assert_close(model(other)[:, :30], logits, atol=1e-4, rtol=1e-4)


def test_bidirectional_logits_depend_on_later_tokens():
    model = Reformer(dataclasses.replace(SMALL, causal=False)).eval()
    x = tokens()
    changed = x.clone()
    changed[:, 40] = 5 + (x[:, 40] - 4) % 4
    assert not torch.allclose(model(changed)[:, 36], model(x)[:, 36], atol=1e-4)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("positions", POSITIONS)
def test_padding_changes_nothing_for_real_tokens(causal, positions):
    model = Reformer(dataclasses.replace(SMALL, causal=causal, positions=positions)).eval()
    x = tokens(length=60)
    mask = torch.arange(60) < torch.tensor([[60], [33]])
    x[~mask] = 0
    torch.testing.assert_close(model(x, mask=mask)[1:, :33], model(x[1:, :33]), atol=1e-4, rtol=1e-4)


def test_local_and_lsh_layers_may_have_their_own_dropout():
    setting = dataclasses.replace(SMALL, attention_dropout=0.5)
    own = dataclasses.replace(setting, local=LocalConfig(window=8, dropout=0.0))
    assert [own.attention_rate(kind) for kind in ("local", "lsh", "full")] == [0.0, 0.5, 0.5]
    x = tokens()
    for layers, differs in ((["local"], True), (["lsh"], False)):
        models = [Reformer(dataclasses.replace(config, layers=layers, depth=1)) for config in (setting, own)]
        models[1].load_state_dict(models[0].state_dict())
        assert torch.equal(models[0](x), models[1](x)) != differs


@pytest.mark.parametrize("wrong", [-1, 9])
def test_tokens_outside_the_vocabulary_are_named(wrong):
    model = Reformer(dataclasses.replace(SMALL, vocab_size=9))
    x = torch.tensor([[1, 2, wrong]])
    with pytest.raises(
        ValueError, match=rf"tokens from {min(1, wrong)} to {max(2, wrong)}: the model has the ids 0 to 8"
    ):
        model(x)


def test_every_norm_has_the_epsilon_of_the_config():
    norms = [m for m in Reformer(dataclasses.replace(SMALL, norm_eps=0.5)).modules() if isinstance(m, Norm)]
    assert len(norms) == 7
    assert all(norm.eps == 0.5 for norm in norms)


def test_the_pass_is_a_function_of_weights_tokens_and_seeds():
    model = Reformer(dataclasses.replace(SMALL, dropout=0.2, attention_dropout=0.2))
    x, seeds = tokens(), Seeds(1, 2)
    state = torch.get_rng_state()
    logits = model(x, seeds=seeds)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(99)
    assert torch.equal(model(x, seeds=seeds), logits)
    assert not torch.equal(model(x, seeds=Seeds(1, 3)), logits)
    # A sample's dropout depends on its id, not on its row in the batch.
    ids = Seeds(1, 2, torch.tensor([0, 1]))
    assert torch.equal(model(x, seeds=ids), logits)
    swapped = model(x.flip(0), seeds=Seeds(1, 2, torch.tensor([1, 0])))
    torch.testing.assert_close(swapped.flip(0), logits, atol=1e-4, rtol=1e-4)


def test_weights_are_drawn_from_the_default_generator():
    torch.manual_seed(3)
    first = Reformer(SMALL).state_dict()
    torch.manual_seed(3)
    again = Reformer(SMALL).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_a_copy_and_a_state_dict_are_the_same_model():
    model = Reformer(SMALL)
    other = Reformer(SMALL)
    other.load_state_dict(model.state_dict())
    assert torch.equal(copy.deepcopy(model)(tokens()), model(tokens()))
    assert torch.equal(other(tokens()), model(tokens()))


@pytest.mark.parametrize("length", [1, 2, 7, 61])
def test_sequences_of_any_length_train(length):
    model = Reformer(SMALL)
    x = tokens(length=length)
    model.loss(x, x, seeds=Seeds()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("causal", [True, False])
def test_learns_to_copy(causal):
    """The second half repeats the first: only attention by content can predict it."""
    torch.manual_seed(0)
    config = ReformerConfig(
        vocab_size=20,
        dim=64,
        depth=2,
        heads=4,
        layers=["local", "lsh"],
        causal=causal,
        lsh=LSHConfig(rounds=4, chunk_length=16, n_buckets=4, duplicates="once"),
        local=LocalConfig(window=8),
        feedforward=FeedForwardConfig(mult=2.0),
    )
    model = Reformer(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    losses = []
    for step in range(400):
        word = torch.randint(4, 20, (16, 24), generator=torch.Generator().manual_seed(step))
        x = torch.cat((word, word), dim=1)
        if causal:
            x, labels = x[:, :-1], x[:, 1:].clone()
            labels[:, :23] = -100
        else:
            hidden = torch.zeros_like(x, dtype=torch.bool)
            hidden[:, 24::3] = True
            labels = x.masked_fill(~hidden, -100)
            x = x.masked_fill(hidden, 3)
        loss = model.loss(x, labels, seeds=Seeds(0, step)) / (labels != -100).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if len(losses) > 20 and max(losses[-20:]) < 0.5 * math.log(16):
            break
    print(f"nats per token at the start {losses[0]:.2f}, after {len(losses)} steps {losses[-1]:.2f}")
    assert max(losses[-20:]) < 0.5 * math.log(16)


def test_a_sequence_that_does_not_fit_is_refused():
    model = Reformer(dataclasses.replace(SMALL, positions="learned"))
    with pytest.raises(ConfigError, match="65 tokens"):
        model(tokens(length=65))
    Reformer(SMALL)(tokens(length=65))


def test_inputs_that_cannot_work_are_refused():
    model = Reformer(SMALL)
    with pytest.raises(ConfigError, match="at least 1"):
        model(tokens(length=0))
    with pytest.raises(ValueError, match="must be bool"):
        model(tokens(), mask=torch.ones(2, 50))


def test_outputs_of_layers_in_one_pass():
    causal = Reformer(SMALL).eval()
    found = causal.body.outputs(tokens(), Call(Seeds(1)), [0, 2, 3])
    expected = read_block(causal, tokens(), start(causal, 2, seeds=Seeds(1)), layers=[0, 2, 3]).hidden
    assert list(found) == [0, 2, 3] and found[0].shape == (2, 50, 32)
    for layer, states in found.items():
        torch.testing.assert_close(states, expected[layer], atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        both_sides = Reformer(dataclasses.replace(SMALL, causal=False)).eval()
        last = both_sides.body.outputs(tokens(), Call(Seeds(1)), [3])[3]
        assert torch.equal(last, both_sides.body(tokens(), seeds=Seeds(1)))
    learned = Reformer(dataclasses.replace(SMALL, positions="learned"))
    with pytest.raises(ConfigError, match="max_length"):
        learned.body.outputs(tokens(length=65), Call(Seeds(1)), [3])
