"""Weights and settings from and to transformers' Reformer: the same function, and nothing lost on the way."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megabase.models import (
    ConfigError,
    FeedForwardConfig,
    LocalConfig,
    LSHConfig,
    Reformer,
    ReformerClassifier,
    ReformerConfig,
)
from megabase.models.attention.kernels.inputs import SortedOrder
from megabase.models.attention.lsh import LSHAttention
from megabase.models.huggingface import OURS, from_huggingface, to_huggingface
from megabase.models.reversible import FloatingPoint

transformers = pytest.importorskip("transformers")

CAUSAL = transformers.ReformerModelWithLMHead
MASKED = transformers.ReformerForMaskedLM
CLASSIFIER = transformers.ReformerForSequenceClassification

THEIRS: dict[str, Any] = {
    "vocab_size": 13,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "attention_head_size": 6,
    "feed_forward_size": 20,
    "axial_pos_shape": [8, 12],
    "axial_pos_embds_dim": [6, 10],
    "max_position_embeddings": 96,
    "local_attn_chunk_length": 8,
    "lsh_attn_chunk_length": 8,
    "num_hashes": 3,
    "num_buckets": 6,
    "layer_norm_eps": 1e-3,
    "hidden_dropout_prob": 0.0,
    "local_attention_probs_dropout_prob": 0.0,
    "lsh_attention_probs_dropout_prob": 0.0,
}
"""Small, and off the defaults wherever that could hide a mistake. Chunks shorter than the sequences."""

LOCAL = ["local", "local", "local"]
LSH = ["lsh", "lsh"]
MIXED = ["local", "lsh", "local", "lsh"]

OURS_CAUSAL = ReformerConfig(
    vocab_size=9,
    dim=16,
    depth=3,
    heads=2,
    layers=["local", "lsh"],
    max_length=64,
    positions="axial",
    conv=0,
    residual="float",
    loss_chunk=100,
    lsh=LSHConfig(rounds=2, chunk_length=8, attend="chunk"),
    local=LocalConfig(window=8, attend="chunk"),
    feedforward=FeedForwardConfig(mult=2.7, activation="relu", chunk=32),
)


def theirs(kind: type, layers: list[str], *, dtype: torch.dtype = torch.float64, **changes: Any) -> nn.Module:
    """Their model, every weight of it moved off its initial value, `lm_head.bias` apart. In fp64: see
    `test_in_fp32_it_is_theirs_that_is_off`."""
    torch.manual_seed(0)
    settings = THEIRS | {"attn_layers": layers, "is_decoder": kind is CAUSAL} | changes
    model = kind(transformers.ReformerConfig(**settings)).to(dtype).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name != "lm_head.bias":
                weight.add_(0.2 * torch.randn_like(weight))
    return model


class Doubles(FloatingPoint):
    """Streams as fp64: neither fixed point nor fp32 hides a difference between the two models."""

    @staticmethod
    def encode(x: Tensor, invalid: Tensor | None = None) -> Tensor:
        return x.to(torch.float64, copy=True)


def in_doubles(model: nn.Module) -> Reformer | ReformerClassifier:
    """from_huggingface, with fp64 streams."""
    ours = from_huggingface(model)
    ours.body.stack.arithmetic = Doubles
    return ours


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


def tokens(batch: int = 2, length: int = 96, vocab: int = 13) -> Tensor:
    return torch.randint(1, vocab, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def same_buckets(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """same_buckets(model): from then on our LSH layers meet in the buckets that theirs last had at that depth."""
    found: dict[int, Tensor | None] = {}
    attend = LSHAttention.attend

    def attend_as_theirs(layer: LSHAttention, qk: Tensor, v: Tensor, order: SortedOrder, call: Any) -> Tensor:
        seen = found[layer.layer]
        # None: a sequence within one chunk, where the buckets do not matter. Theirs may have padding at the end.
        if seen is not None:
            mask = None if call.mask is None else call.mask.repeat_interleave(qk.shape[1], dim=0)
            order = SortedOrder.by_bucket(seen[..., : qk.shape[2]].flatten(0, 1), mask)
        return attend(layer, qk, v, order, call)

    def note(layer: nn.Module, _: object, result: Any) -> None:
        found[layer.layer_idx] = result.buckets

    def watch(model: nn.Module) -> None:
        monkeypatch.setattr(LSHAttention, "attend", attend_as_theirs)
        for module in model.modules():
            if type(module).__name__ == "LSHSelfAttention":
                module.register_forward_hook(note)

    return watch


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    one, two = a.state_dict(), b.state_dict()
    return one.keys() == two.keys() and all(
        one[name].dtype == two[name].dtype and torch.equal(one[name], two[name]) for name in one
    )


# The same function


@pytest.mark.parametrize("kind", [CAUSAL, MASKED, CLASSIFIER])
@pytest.mark.parametrize("layers", [LOCAL, LSH, MIXED], ids="-".join)
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_logits_are_theirs(kind, layers, activation, same_buckets):
    model = theirs(kind, layers, hidden_act=activation)
    same_buckets(model)
    x = tokens()
    wanted = model(x).logits
    assert wanted.std() > 0.01
    close(in_doubles(model)(x), wanted)
    logits = from_huggingface(model)(x)
    print(
        "standard deviation and largest difference:",
        wanted.std().item(),
        (logits - wanted).abs().max().item(),
    )
    torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("length", [1, 8, 50, 90])
@pytest.mark.parametrize("kind", [CAUSAL, MASKED])
def test_any_length_that_theirs_pads(kind, length, same_buckets):
    model = theirs(kind, MIXED)
    same_buckets(model)
    x = tokens(length=length)
    wanted = model(x).logits
    close(in_doubles(model)(x), wanted)


def test_logits_are_theirs_in_fp32():
    model = theirs(CAUSAL, LOCAL, dtype=torch.float32)
    torch.testing.assert_close(from_huggingface(model)(tokens()), model(tokens()).logits, atol=1e-4, rtol=0)


def test_in_fp32_it_is_theirs_that_is_off(same_buckets):
    """Their self score of -1e5 leaves fp32 two digits of the weights of a position that meets nothing else."""
    model = theirs(CAUSAL, MIXED, dtype=torch.float32)
    same_buckets(model)
    x = tokens()
    off, ours = model(x).logits, from_huggingface(model)(x)
    exact = in_doubles(model.double())(x)
    errors = [(logits - exact).abs().max().item() for logits in (ours, off)]
    print("off from fp64, ours and theirs:", errors)
    assert errors[0] < errors[1] / 10


@pytest.mark.parametrize("kind", [CAUSAL, MASKED, CLASSIFIER])
@pytest.mark.parametrize("layers", [LOCAL, MIXED], ids="-".join)
def test_padding_masks_are_theirs(kind, layers, same_buckets):
    """While the last chunk holds a real token: beyond, the rings differ (models/huggingface.py)."""
    model = theirs(kind, layers)
    same_buckets(model)
    x = tokens(batch=3)
    mask = torch.arange(96) < torch.tensor([[96], [95], [89]])
    wanted = model(x, attention_mask=mask).logits
    logits = in_doubles(model)(x, mask=mask)
    if kind is not CLASSIFIER:
        logits, wanted = logits[mask], wanted[mask]
    close(logits, wanted)


def test_a_causal_local_model_takes_any_padding():
    model = theirs(CAUSAL, LOCAL)
    x = tokens(batch=3)
    mask = torch.arange(96) < torch.tensor([[96], [40], [3]])
    close(in_doubles(model)(x, mask=mask)[mask], model(x, attention_mask=mask).logits[mask])


@pytest.mark.parametrize(
    "changes",
    [
        {"axial_pos_embds": False},
        {"num_buckets": [2, 4]},
        {"num_buckets": None},
        {"local_attn_chunk_length": 16},
        {"lsh_attn_chunk_length": 24},
        {"attention_head_size": 8},
        {"tie_word_embeddings": True},
        {"num_hashes": 1},
    ],
    ids=str,
)
def test_every_setting_keeps_its_meaning(changes, same_buckets):
    model = theirs(CAUSAL, MIXED, **changes)
    ours = in_doubles(model)
    assert to_huggingface(ours).config.to_dict() == model.config.to_dict()
    same_buckets(model)
    wanted = model(tokens()).logits
    close(ours(tokens()), wanted)


@pytest.mark.parametrize("kind", [CAUSAL, MASKED, CLASSIFIER])
def test_gradients_are_theirs(kind, same_buckets):
    model = theirs(kind, MIXED).train()
    same_buckets(model)
    ours = in_doubles(model)
    x = tokens()
    y = model(x).logits
    grad = torch.randn_like(y)
    y.backward(grad)
    ours(x).backward(grad)
    # Their names for our gradients: to_huggingface carries over what it is given as weights.
    with torch.no_grad():
        for weight in ours.parameters():
            weight.copy_(weight.grad)
    named = dict(to_huggingface(ours).named_parameters())
    for name, weight in model.named_parameters():
        if name != "lm_head.bias":
            assert weight.grad.abs().max() > 0, name
            torch.testing.assert_close(named[name], weight.grad, atol=1e-8, rtol=1e-8)


def test_a_model_of_ours_exports_the_same_function(same_buckets):
    ours = Reformer(dataclasses.replace(OURS_CAUSAL, tie_embeddings=True)).double().eval()
    ours.body.stack.arithmetic = Doubles
    model = to_huggingface(ours)
    assert isinstance(model, CAUSAL)
    same_buckets(model)
    x = tokens(vocab=9, length=64)
    wanted = model(x).logits
    close(ours(x), wanted)


# There and back


@pytest.mark.parametrize("kind", [CAUSAL, MASKED, CLASSIFIER])
@pytest.mark.parametrize("layers", [LOCAL, LSH, MIXED], ids="-".join)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_theirs_to_ours_and_back_is_the_same_model(kind, layers, dtype):
    changes = {
        "hidden_dropout_prob": 0.1,
        "lsh_attention_probs_dropout_prob": 0.2,
        "local_attention_probs_dropout_prob": 0.3,
        "num_labels": 5,
        "id2label": {i: f"kind {i}" for i in range(5)},
        "initializer_range": 0.5,
        "eos_token_id": 7,
        "hash_seed": 3,
        "chunk_size_lm_head": 4,
    }
    model = theirs(kind, layers, dtype=dtype, **changes)
    state = torch.get_rng_state()
    again = to_huggingface(from_huggingface(model))
    assert torch.equal(state, torch.get_rng_state())
    assert type(again) is type(model)
    assert same_weights(again, model)
    assert again.config.to_dict() == model.config.to_dict()
    assert again.training == model.training
    # Copies: neither is changed through the other.
    assert not {w.data_ptr() for w in again.parameters()} & {w.data_ptr() for w in model.parameters()}


def test_the_files_there_and_back_are_the_same_bytes(tmp_path):
    theirs(CAUSAL, MIXED, dtype=torch.float32, pad_token_id=1).save_pretrained(tmp_path / "one")
    model = CAUSAL.from_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "two")
    to_huggingface(from_huggingface(model)).save_pretrained(tmp_path / "three")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "three" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


OURS_VARIED = [
    OURS_CAUSAL,
    dataclasses.replace(OURS_CAUSAL, causal=False, positions="learned", head_dim=5, head_bias=True),
    dataclasses.replace(OURS_CAUSAL, tie_embeddings=True, layers=["local", "local"], max_length=60),
    dataclasses.replace(
        OURS_CAUSAL, dropout=0.1, attention_dropout=0.2, axial_shape=[4, 20], axial_dims=[5, 11]
    ),
    dataclasses.replace(OURS_CAUSAL, lsh=LSHConfig(n_buckets=1024, attend="chunk", dropout=0.4)),
    dataclasses.replace(OURS_CAUSAL, layers=["local"], conv=0, lsh=LSHConfig(duplicates="once")),
]


@pytest.mark.parametrize("config", OURS_VARIED, ids=range(len(OURS_VARIED)))
@pytest.mark.parametrize("saved", [False, True], ids=["in memory", "on disk"])
def test_ours_to_theirs_and_back_is_the_same_model(config, saved, tmp_path):
    model = Reformer(config).eval()
    exported = to_huggingface(model)
    if saved:
        exported.save_pretrained(tmp_path)
        assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "reformer"
        exported = type(exported).from_pretrained(tmp_path)
    again = from_huggingface(exported)
    assert again.body.config == config
    assert same_weights(again, model)
    assert torch.equal(again(tokens(vocab=9, length=50)), model(tokens(vocab=9, length=50)))
    if config.tie_embeddings:
        assert again.head.weight is again.body.embedding.tokens.weight


def test_a_classifier_of_ours_there_and_back():
    config = dataclasses.replace(OURS_CAUSAL, causal=False, classifier="first")
    model = ReformerClassifier(config, classes=3)
    exported = to_huggingface(model)
    assert exported.config.num_labels == 3
    again = from_huggingface(exported)
    assert again.body.config == config
    assert same_weights(again, model)


def test_what_was_changed_on_their_side_counts():
    model = to_huggingface(Reformer(OURS_CAUSAL))
    assert getattr(model.config, OURS)["loss_chunk"] == 100
    model.config.num_hashes = 7
    assert from_huggingface(model).body.config.lsh.rounds == 7
    model = to_huggingface(Reformer(OURS_CAUSAL))
    getattr(model.config, OURS)["a setting of another version"] = 1
    assert from_huggingface(model).body.config.loss_chunk == ReformerConfig().loss_chunk
    # A tied head that was trained apart is one no longer.
    tied = to_huggingface(Reformer(dataclasses.replace(OURS_CAUSAL, tie_embeddings=True)))
    with torch.no_grad():
        tied.lm_head.decoder.weight[0, 0] += 1
    again = from_huggingface(tied)
    assert not again.body.config.tie_embeddings
    assert torch.equal(again.head.weight, tied.lm_head.decoder.weight)


def test_a_head_bias_is_kept_and_spoken_of():
    """transformers 5 has the parameter and does not add it: ours does, and says so."""
    model = theirs(CAUSAL, LOCAL)
    without = from_huggingface(model)(tokens())
    with torch.no_grad():
        model.lm_head.bias.normal_()
    with pytest.warns(UserWarning, match=r"lm_head\.bias is not zero"):
        ours = from_huggingface(model)
    torch.testing.assert_close(ours(tokens()), without + model.lm_head.bias)
    with pytest.warns(UserWarning, match=r"lm_head\.bias is not zero"):
        again = to_huggingface(ours)
    assert same_weights(again, model)
    assert again.config.to_dict() == model.config.to_dict()


# What is refused


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
def test_settings_of_theirs_that_ours_has_not_are_named(changes, message):
    kind = MASKED if any("after" in key for key in changes) else CAUSAL
    layers = LSH if changes.get("lsh_attn_chunk_length", 1) is None else MIXED
    with pytest.raises(ConfigError, match=message) as error:
        from_huggingface(theirs(kind, layers, **changes))
    assert "\n" not in str(error.value)


def test_settings_of_layers_that_are_not_there_do_not_matter():
    model = theirs(CAUSAL, LOCAL, lsh_num_chunks_after=1, num_buckets=None, num_hashes=9)
    assert to_huggingface(from_huggingface(model)).config.to_dict() == model.config.to_dict()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"positions": "rotary"}, "model.positions=rotary"),
        ({"positions": "none"}, "only axial and learned"),
        ({"norm": "rms"}, "model.norm=rms"),
        ({"conv": 4}, "model.conv=4"),
        ({"layers": ["local", "full"]}, "'full' layers"),
        ({"feedforward": FeedForwardConfig(activation="swiglu")}, "model.feedforward.activation=swiglu"),
        ({"local": LocalConfig()}, "model.local.attend=window"),
        ({"lsh": LSHConfig()}, "model.lsh.attend=window"),
        ({"lsh": LSHConfig(attend="chunk", duplicates="once")}, "model.lsh.duplicates=once"),
    ],
)
def test_settings_of_ours_that_theirs_has_not_are_named(changes, message):
    with pytest.raises(ConfigError, match=message) as error:
        to_huggingface(Reformer(dataclasses.replace(OURS_CAUSAL, **changes)))
    assert "\n" not in str(error.value)


def test_models_that_the_other_side_has_not_are_named():
    with pytest.raises(ConfigError, match="ReformerForQuestionAnswering"):
        from_huggingface(theirs(transformers.ReformerForQuestionAnswering, LOCAL))
    with pytest.raises(ConfigError, match="Linear"):
        to_huggingface(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match=r"model\.classifier=mean"):
        to_huggingface(ReformerClassifier(OURS_CAUSAL, classes=2))
    adapted = theirs(CAUSAL, LOCAL)
    adapted.adapter = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match=r"adapter\.bias"):
        from_huggingface(adapted)


def test_models_need_no_transformers():
    script = """
import sys
sys.modules["transformers"] = None
from megabase.models import ConfigError
from megabase.models.huggingface import from_huggingface
try:
    from_huggingface(None)
except ConfigError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "pip install 'transformers" in run.stdout
