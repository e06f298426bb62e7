"""Settings: which are refused and why, what follows from them, and how a dictionary becomes a config."""

import copy
import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megabase.models import (
    ConfigError,
    FeedForwardConfig,
    LinformerConfig,
    LocalConfig,
    LSHConfig,
    PerformerConfig,
    Reformer,
    ReformerConfig,
)
from megabase.models.attention import KINDS
from megabase.models.config import LAYERS, MARGIN

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
PERFORMER = dataclasses.replace(SMALL, layers=["performer"])
LINFORMER = dataclasses.replace(SMALL, layers=["linformer"], causal=False)


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (SMALL, {"vocab_size": None}, "vocab_size"),
        (SMALL, {"dim": 18, "heads": 4}, "take dim=20"),
        (SMALL, {"layers": ["lhs"]}, "did you mean 'lsh'"),
        (SMALL, {"layers": []}, "layers is empty"),
        (SMALL, {"norm": "laier"}, "did you mean 'layer'"),
        (SMALL, {"residual": "fix"}, "did you mean 'fixed'"),
        (SMALL, {"positions": "rotory"}, "did you mean 'rotary'"),
        (SMALL, {"positions": "axial", "max_length": None}, "max_length"),
        (SMALL, {"positions": "learned", "max_length": None}, "max_length"),
        (SMALL, {"axial_shape": [4, 4]}, "holds 16 positions"),
        (SMALL, {"axial_shape": [4]}, "two positive"),
        (SMALL, {"axial_dims": [4, 4]}, "axial_dims=.* whose sum is model.dim=16"),
        (SMALL, {"axial_dims": [16]}, "two positive"),
        (SMALL, {"norm_eps": 0.0}, "norm_eps=0.0"),
        (SMALL, {"classifier": "frist"}, "did you mean 'first'"),
        (SMALL, {"heads": 16, "head_dim": 3}, "even model.head_dim"),
        (SMALL, {"layers": ["lsh"], "conv": 0}, "rotary does nothing"),
        (SMALL, {"dropout": 1.0}, "dropout=1.0"),
        (SMALL, {"attention_dropout": -0.1}, "attention_dropout"),
        (SMALL, {"depth": 0}, "depth=0"),
        (SMALL, {"conv": -1}, "conv=-1"),
        (SMALL, {"loss_chunk": 0}, "loss_chunk"),
        (SMALL, {"lsh": LSHConfig(rounds=0)}, "lsh.rounds=0"),
        (SMALL, {"lsh": LSHConfig(n_buckets=5)}, "take 6"),
        (SMALL, {"lsh": LSHConfig(attend="chunks")}, "did you mean 'chunk'"),
        (SMALL, {"lsh": LSHConfig(duplicates="all")}, "average, once"),
        (SMALL, {"lsh": LSHConfig(dropout=1.0)}, "lsh.dropout=1.0"),
        (SMALL, {"local": LocalConfig(dropout=-0.5)}, "local.dropout=-0.5"),
        (SMALL, {"local": LocalConfig(window=0)}, "local.window=0"),
        (SMALL, {"local": LocalConfig(attend="x")}, "window, chunk"),
        (SMALL, {"feedforward": FeedForwardConfig(activation="gelo")}, "did you mean 'gelu'"),
        (SMALL, {"feedforward": FeedForwardConfig(mult=0.0)}, "hidden layer"),
        (SMALL, {"feedforward": FeedForwardConfig(chunk=-1)}, "feedforward.chunk"),
        (SMALL, {"query_gain": 0.0}, "query_gain=0.0 must be above 0"),
        (
            SMALL,
            {"causal": False, "values_ahead": True},
            "values_ahead=True is not for local .* model.causal=False",
        ),
        (
            SMALL,
            {"lsh": LSHConfig(attend="chunk"), "values_ahead": True},
            "for lsh layers with model.lsh.attend=chunk",
        ),
        (LINFORMER, {"values_ahead": True}, "values_ahead=True is not for linformer layers"),
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


@pytest.mark.parametrize(
    ("positions", "length", "message"),
    [
        ("learned", 65, "65 tokens do not fit model.max_length=64"),
        ("axial", 65, "65 tokens do not fit model.max_length=64"),
        ("rotary", 0, "the length of a sequence=0"),
    ],
)
def test_lengths_that_do_not_fit_are_refused(positions, length, message):
    config = dataclasses.replace(SMALL, positions=positions)
    with pytest.raises(ConfigError, match=message):
        config.validate(length)
    config.validate(64)


def test_values_look_ahead_in_causal_layers_with_windows():
    chunked = dataclasses.replace(SMALL, lsh=LSHConfig(attend="chunk"))
    assert [SMALL.looks_ahead(kind) for kind in ("local", "lsh", "full", "performer")] == [True] * 4
    assert [chunked.looks_ahead(kind) for kind in ("local", "lsh")] == [True, False]
    for off in ({"values_ahead": False}, {"causal": False}):
        assert not any(dataclasses.replace(SMALL, **off).looks_ahead(kind) for kind in LAYERS)


@pytest.mark.parametrize(("width", "chunk"), [(16, 16), (32, 8), (64, 64), (128, 256)])
def test_the_gain_makes_an_equal_key_outweigh_the_others(width, chunk):
    """By MARGIN nats, or where heads are too narrow for it, by as much as any gain can."""
    config = dataclasses.replace(SMALL, head_dim=width, lsh=LSHConfig(4, chunk), max_length=4096)

    def margin(gain: float) -> float:
        return gain * width**0.5 - gain**2 / 2 - math.log(4 * chunk)

    gain = config.gain("lsh")
    best = margin(width**0.5)
    assert margin(gain) == pytest.approx(min(MARGIN, best))
    assert gain <= width**0.5 + 1e-9
    assert dataclasses.replace(config, query_gain=1.5).gain("lsh") == 1.5


def test_rotary_positions_do_not_limit_the_length():
    SMALL.validate(65)


def test_local_layers_may_drop_weights_beside_performer_layers():
    local = LocalConfig(window=8, dropout=0.2)
    dataclasses.replace(PERFORMER, layers=["local", "performer"], local=local).validate()


def test_the_config_names_every_kind_of_layer():
    assert set(KINDS) == set(LAYERS)


def test_omegaconf_takes_the_config_as_a_schema():
    omegaconf = pytest.importorskip("omegaconf")
    tree = omegaconf.OmegaConf.merge(omegaconf.OmegaConf.structured(ReformerConfig), {"lsh": {"rounds": 2}})
    config = omegaconf.OmegaConf.to_object(tree)
    assert config == ReformerConfig(lsh=LSHConfig(rounds=2))


def test_buckets_follow_max_length_and_nothing_else():
    assert ReformerConfig(max_length=4096).buckets == 256
    assert ReformerConfig(max_length=5000).buckets == 256
    assert ReformerConfig(max_length=1 << 20).buckets == 65536
    # As many as before values could look ahead: such models keep the buckets that they were trained with.
    assert ReformerConfig(max_length=4096, values_ahead=False).buckets == 64
    assert ReformerConfig(max_length=4096, causal=False).buckets == 64
    assert ReformerConfig(max_length=10).buckets == 4
    assert ReformerConfig().buckets == 64
    assert ReformerConfig(max_length=4096, lsh=LSHConfig(n_buckets=10)).buckets == 10


settings_that_work = st.builds(
    ReformerConfig,
    vocab_size=st.integers(1, 100),
    layers=st.lists(st.sampled_from(["local", "lsh", "full"]), min_size=1, max_size=3),
    conv=st.integers(1, 5),
    norm_eps=st.floats(1e-9, 1.0),
    lsh=st.builds(LSHConfig, rounds=st.integers(1, 9), n_buckets=st.sampled_from([None, 2, 300])),
    feedforward=st.builds(FeedForwardConfig, chunk=st.integers(0, 9)),
)


@given(settings_that_work)
def test_a_config_is_rebuilt_from_its_dictionary(config):
    nested = dataclasses.asdict(config)
    before = copy.deepcopy(nested)
    flat = {}
    for name, value in nested.items():
        if isinstance(value, dict):
            flat |= {f"{name}.{inner}": one for inner, one in value.items()}
        else:
            flat[name] = value
    assert ReformerConfig.from_dict(nested) == config
    assert ReformerConfig.from_dict(flat) == config
    assert nested == before


def test_settings_that_are_missing_have_their_defaults():
    found = ReformerConfig.from_dict({"vocab_size": 9, "lsh": {"rounds": 2}, "lsh.chunk_length": 8})
    assert found == ReformerConfig(vocab_size=9, lsh=LSHConfig(rounds=2, chunk_length=8))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"depht": 3}, "model.depht is a setting that this version does not know"),
        ({"lsh": {"round": 3}}, "model.lsh.round is a setting"),
        ({"lsh.round": 3}, "model.lsh.round is a setting"),
        ({"dim.width": 3}, "model.dim.width is a setting"),
        ({"lsh": 5}, "model.lsh=5 must be a group of settings"),
        ({"lsh": 5, "lsh.rounds": 3}, "model.lsh=5 must be a group of settings"),
        ({"dim": "64"}, "a setting of the model has a value of the wrong type"),
        ({"depth": 0}, "model.depth=0"),
    ],
)
def test_dictionaries_with_wrong_settings_are_refused(values, message):
    with pytest.raises(ConfigError, match=message) as error:
        ReformerConfig.from_dict({"vocab_size": 9} | values)
    assert "\n" not in str(error.value)
