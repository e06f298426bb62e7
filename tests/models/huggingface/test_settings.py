"""Settings from transformers' config and back: which are refused, and which take effect."""

import dataclasses

import pytest

from megabase.models import (
    ConfigError,
    FeedForwardConfig,
    LocalConfig,
    LSHConfig,
    Reformer,
    ReformerConfig,
)
from megabase.models.huggingface import from_huggingface, to_huggingface
from megabase.models.huggingface.settings import MEGABASE_KEY
from tests.models.huggingface.reference import (
    CAUSAL,
    CONFIG,
    LOCAL,
    LSH,
    MASKED,
    MIXED,
    transformers_model,
)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "silu"}, "hidden_act='silu'"),
        ({"local_num_chunks_before": 2}, "local_num_chunks_before=2"),
        ({"local_num_chunks_after": 1}, "local_num_chunks_after=1"),
        ({"lsh_num_chunks_before": 0}, "lsh_num_chunks_before=0"),
        ({"lsh_num_chunks_after": 1}, "lsh_num_chunks_after=1"),
        ({"lsh_attn_chunk_length": None}, "lsh_attn_chunk_length=None"),
        ({"classifier_dropout": 0.5}, "classifier_dropout=0.5"),
        ({"max_position_embeddings": 100}, "axial_pos_shape holds 96 positions"),
        ({"axial_pos_shape": [4, 4, 6], "axial_pos_embds_dim": [4, 4, 8]}, "axial_pos_shape="),
        ({"num_buckets": 300 + 2}, "n_buckets=302"),
    ],
)
def test_settings_that_only_transformers_has_are_refused_by_name(changes, message):
    kind = MASKED if any("after" in key for key in changes) else CAUSAL
    layers = LSH if changes.get("lsh_attn_chunk_length", 1) is None else MIXED
    with pytest.raises(ConfigError, match=message) as error:
        from_huggingface(transformers_model(kind, layers, **changes))
    assert "\n" not in str(error.value)


def test_settings_of_kinds_of_layers_that_the_model_lacks_do_not_matter():
    model = transformers_model(CAUSAL, LOCAL, lsh_num_chunks_after=1, num_buckets=None, num_hashes=9)
    assert to_huggingface(from_huggingface(model)).config.to_dict() == model.config.to_dict()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"positions": "rotary"}, "model.positions=rotary"),
        ({"positions": "none"}, "model.positions=none: retrain with model.positions=learned$"),
        (
            {"positions": "rotary", "conv": 4},
            "of model.positions=rotary, model.conv=4: retrain with model.positions=learned model.conv=0$",
        ),
        ({"norm": "rms"}, "model.norm=rms"),
        ({"conv": 4}, "model.conv=4"),
        ({"layers": ["local", "full"]}, "'full' layers"),
        ({"feedforward": FeedForwardConfig(activation="swiglu")}, "model.feedforward.activation=swiglu"),
        ({"local": LocalConfig()}, "model.local.attend=window"),
        ({"lsh": LSHConfig()}, "model.lsh.attend=window"),
        ({"lsh": LSHConfig(attend="chunk", duplicates="once")}, "model.lsh.duplicates=once"),
    ],
)
def test_settings_that_only_megabase_has_are_refused_by_name(changes, message):
    with pytest.raises(ConfigError, match=message) as error:
        to_huggingface(Reformer(dataclasses.replace(CONFIG, **changes)))
    assert "\n" not in str(error.value)


def test_settings_changed_in_transformers_replace_the_saved_ones():
    model = to_huggingface(Reformer(CONFIG))
    assert getattr(model.config, MEGABASE_KEY)["loss_chunk"] == 100
    model.config.num_hashes = 7
    assert from_huggingface(model).body.config.lsh.rounds == 7
    model = to_huggingface(Reformer(CONFIG))
    getattr(model.config, MEGABASE_KEY)["a setting of another version"] = 1
    assert from_huggingface(model).body.config.loss_chunk == ReformerConfig().loss_chunk
