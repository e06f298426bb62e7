"""The whole model: shapes, causality, what it depends on; its settings; positions; FLOPs."""

import copy
import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megabase.models import (
    ConfigError,
    FeedForwardConfig,
    LocalConfig,
    LSHConfig,
    Reformer,
    ReformerClassifier,
    ReformerConfig,
    Seeds,
)
from megabase.models.attention import KINDS
from megabase.models.config import LAYERS, NORMS
from megabase.models.flops import flops_per_token, keys_per_query, training_flops_per_token
from megabase.models.layers import Norm
from megabase.models.positions import build_positions, rotary

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
    assert loss.item() == pytest.approx((labels != -100).sum().item() * math.log(9) / 2, rel=0.3)


@pytest.mark.parametrize("positions", POSITIONS)
def test_causal_logits_do_not_depend_on_later_tokens(positions):
    model = Reformer(dataclasses.replace(SMALL, positions=positions)).eval()
    x = tokens()
    changed = torch.cat((x[:, :30], tokens(seed=1)[:, 30:]), dim=1)
    logits = model(x)[:, :30]
    for other in (changed, x[:, :30]):
        torch.testing.assert_close(model(other)[:, :30], logits, atol=1e-4, rtol=1e-4)


def test_bidirectional_logits_do():
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


def test_classifier_pools_real_tokens():
    model = ReformerClassifier(dataclasses.replace(SMALL, causal=False), classes=3).eval()
    x = tokens(length=40)
    mask = torch.arange(40) < torch.tensor([[40], [25]])
    logits = model(x, mask=mask)
    assert logits.shape == (2, 3)
    torch.testing.assert_close(logits[1:], model(x[1:, :25]), atol=1e-4, rtol=1e-4)
    logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_classifier_of_the_first_token():
    config = dataclasses.replace(SMALL, causal=False, classifier="first", dropout=0.2)
    model = ReformerClassifier(config, classes=3)
    x = tokens(length=40)
    logits = model(x, seeds=Seeds(1, 2))
    assert torch.equal(model(x, seeds=Seeds(1, 2)), logits)
    logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    # Within the head, dropout is a function of seeds and sample too.
    hidden = torch.randn(2, 32)
    assert not torch.equal(model.head(hidden, Seeds(1, 2)), model.head(hidden, Seeds(1, 3)))
    model.eval()
    hidden = model.body(x)[:, 0]
    wanted = model.head.output(model.head.dense(hidden).tanh())
    torch.testing.assert_close(model(x), wanted)


def test_kinds_of_layers_may_have_their_own_dropout():
    setting = dataclasses.replace(SMALL, attention_dropout=0.5)
    own = dataclasses.replace(setting, local=LocalConfig(window=8, dropout=0.0))
    assert [own.attention_rate(kind) for kind in ("local", "lsh", "full")] == [0.0, 0.5, 0.5]
    x = tokens()
    for layers, differs in ((["local"], True), (["lsh"], False)):
        models = [Reformer(dataclasses.replace(config, layers=layers, depth=1)) for config in (setting, own)]
        models[1].load_state_dict(models[0].state_dict())
        assert torch.equal(models[0](x), models[1](x)) != differs


def test_norm_eps_is_what_the_variance_gets():
    x = torch.randn(3, 8)
    centred = x - x.mean(-1, keepdim=True)
    wanted = {
        "layer": centred * (centred.square().mean(-1, keepdim=True) + 0.5).rsqrt(),
        "rms": x * (x.square().mean(-1, keepdim=True) + 0.5).rsqrt(),
    }
    for kind in NORMS:
        torch.testing.assert_close(Norm(8, kind, 0.5)(x), wanted[kind])
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
    # A sample's dropout goes with its id, not with its place in the batch.
    ids = Seeds(1, 2, torch.tensor([0, 1]))
    assert torch.equal(model(x, seeds=ids), logits)
    swapped = model(x.flip(0), seeds=Seeds(1, 2, torch.tensor([1, 0])))
    torch.testing.assert_close(swapped.flip(0), logits, atol=1e-4, rtol=1e-4)


def test_weights_come_from_the_default_generator():
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
def test_any_length(length):
    model = Reformer(SMALL)
    x = tokens(length=length)
    model.loss(x, x, seeds=Seeds()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("causal", [True, False])
def test_learns_to_copy(causal):
    """The second half repeats the first: only content-based attention can know it."""
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
    start, end = losses[0], sum(losses[-40:]) / 40
    print("nats per token at the start and the end:", start, end)
    assert end < 0.5 * math.log(16)
    assert max(losses[-40:]) - min(losses[-40:]) < 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": None}, "vocab_size"),
        ({"dim": 18, "heads": 4}, "take dim=20"),
        ({"layers": ["lhs"]}, "did you mean 'lsh'"),
        ({"layers": []}, "layers is empty"),
        ({"norm": "laier"}, "did you mean 'layer'"),
        ({"residual": "fix"}, "did you mean 'fixed'"),
        ({"positions": "rotory"}, "did you mean 'rotary'"),
        ({"positions": "axial", "max_length": None}, "max_length"),
        ({"positions": "learned", "max_length": None}, "max_length"),
        ({"axial_shape": [4, 4]}, "holds 16 positions"),
        ({"axial_shape": [4]}, "two positive"),
        ({"axial_dims": [4, 4]}, "axial_dims=.* whose sum is model.dim=16"),
        ({"axial_dims": [16]}, "two positive"),
        ({"norm_eps": 0.0}, "norm_eps=0.0"),
        ({"classifier": "frist"}, "did you mean 'first'"),
        ({"heads": 16, "head_dim": 3}, "even model.head_dim"),
        ({"layers": ["lsh"], "conv": 0}, "rotary does nothing"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"attention_dropout": -0.1}, "attention_dropout"),
        ({"depth": 0}, "depth=0"),
        ({"conv": -1}, "conv=-1"),
        ({"loss_chunk": 0}, "loss_chunk"),
        ({"lsh": LSHConfig(rounds=0)}, "lsh.rounds=0"),
        ({"lsh": LSHConfig(n_buckets=5)}, "take 6"),
        ({"lsh": LSHConfig(attend="chunks")}, "did you mean 'chunk'"),
        ({"lsh": LSHConfig(duplicates="all")}, "average, once"),
        ({"lsh": LSHConfig(dropout=1.0)}, "lsh.dropout=1.0"),
        ({"local": LocalConfig(dropout=-0.5)}, "local.dropout=-0.5"),
        ({"local": LocalConfig(window=0)}, "local.window=0"),
        ({"local": LocalConfig(attend="x")}, "window, chunk"),
        ({"feedforward": FeedForwardConfig(activation="gelo")}, "did you mean 'gelu'"),
        ({"feedforward": FeedForwardConfig(mult=0.0)}, "hidden layer"),
        ({"feedforward": FeedForwardConfig(chunk=-1)}, "feedforward.chunk"),
    ],
)
def test_settings_that_cannot_work_say_why_in_one_line(change, message):
    with pytest.raises(ConfigError, match=message) as error:
        Reformer(dataclasses.replace(SMALL, **change))
    assert "\n" not in str(error.value)


def test_a_sequence_that_does_not_fit_is_refused():
    model = Reformer(dataclasses.replace(SMALL, positions="learned"))
    with pytest.raises(ConfigError, match="65 tokens"):
        model(tokens(length=65))
    Reformer(SMALL)(tokens(length=65))


def test_what_cannot_be_run_is_refused():
    model = Reformer(SMALL)
    with pytest.raises(ConfigError, match="at least 1"):
        model(tokens(length=0))
    with pytest.raises(ValueError, match="must be bool"):
        model(tokens(), mask=torch.ones(2, 50))


def test_every_kind_of_layer_has_its_name_in_the_config():
    assert set(KINDS) == set(LAYERS)


def test_omegaconf_takes_the_config_as_a_schema():
    omegaconf = pytest.importorskip("omegaconf")
    tree = omegaconf.OmegaConf.merge(omegaconf.OmegaConf.structured(ReformerConfig), {"lsh": {"rounds": 2}})
    config = omegaconf.OmegaConf.to_object(tree)
    assert config == ReformerConfig(lsh=LSHConfig(rounds=2))


def test_buckets_follow_max_length_and_nothing_else():
    assert ReformerConfig(max_length=4096).buckets == 64
    assert ReformerConfig(max_length=5000).buckets == 64
    assert ReformerConfig(max_length=1 << 20).buckets == 16384
    assert ReformerConfig(max_length=10).buckets == 2
    assert ReformerConfig().buckets == 64
    assert ReformerConfig(max_length=4096, lsh=LSHConfig(n_buckets=10)).buckets == 10


@pytest.mark.parametrize("max_length", [1, 2, 7, 64, 100, 1000])
def test_axial_positions_are_distinct_and_prefixes_agree(max_length):
    table = build_positions(ReformerConfig(vocab_size=9, dim=8, positions="axial", max_length=max_length))
    assert table is not None
    whole = table(max_length)
    assert whole.shape == (max_length, 8)
    assert whole.unique(dim=0).shape[0] == max_length
    for length in {1, max_length // 2 or 1, max_length}:
        assert torch.equal(table(length), whole[:length])
    assert sum(p.numel() for p in table.parameters()) <= 8 * 4 * math.isqrt(max_length) + 8


def test_axial_rows_and_columns_may_differ_in_width():
    config = ReformerConfig(
        vocab_size=9, dim=8, positions="axial", max_length=12, axial_shape=[3, 4], axial_dims=[2, 6]
    )
    table = build_positions(config)
    assert table is not None
    whole = table(12).view(3, 4, 8)
    assert torch.equal(whole[:, 0, :2], whole[:, 3, :2])
    assert torch.equal(whole[0, :, 2:], whole[2, :, 2:])
    assert not torch.equal(whole[0, 0, :2], whole[1, 0, :2])
    assert not torch.equal(whole[0, 0, 2:], whole[0, 1, 2:])


def test_rotary_products_depend_on_distance_only():
    q, k = torch.randn(8), torch.randn(8)
    turned_q, turned_k = rotary(q.expand(20, 8)), rotary(k.expand(20, 8))
    products = turned_q @ turned_k.T
    torch.testing.assert_close(products[5:, 5:], products[:-5, :-5])
    torch.testing.assert_close(turned_q.norm(dim=-1), q.norm().expand(20))


def count_flops(run: Callable[[], object]) -> int:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    # torch counts no fused attention on CPUs.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        run()
    return counter.get_total_flops()


def test_flops_equal_those_torch_counts():
    config = ReformerConfig(vocab_size=9, dim=32, depth=2, heads=2, layers=["full"], conv=0, causal=False)
    model = Reformer(config)
    x = tokens(batch=1, length=64)
    assert count_flops(lambda: model(x)) == 64 * flops_per_token(config, 64)
    for change in (
        {"tie_embeddings": True},
        {"head_dim": 8},
        {"feedforward": FeedForwardConfig(activation="swiglu")},
    ):
        other = dataclasses.replace(config, **change)
        changed = Reformer(other)
        assert count_flops(lambda model=changed: model(x)) == 64 * flops_per_token(other, 64)


def test_flops_of_attention_count_the_keys_that_are_met():
    config = ReformerConfig(
        vocab_size=9, lsh=LSHConfig(rounds=3, chunk_length=16), local=LocalConfig(window=4)
    )
    assert keys_per_query(config, "lsh", 1000) == 48
    assert keys_per_query(config, "lsh", 10) == 30
    assert keys_per_query(config, "full", 9) == 5
    assert keys_per_query(config, "local", 10) == (1 + 2 + 3 + 7 * 4) / 10
    both = dataclasses.replace(config, causal=False)
    assert keys_per_query(both, "local", 10) == 2 * (1 + 2 + 3 + 7 * 4) / 10 - 1
    model, hardware = training_flops_per_token(config, 1000)
    assert model == 3 * flops_per_token(config, 1000)
    assert model * 1.3 < hardware < model * 4 / 3
