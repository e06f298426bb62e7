"""Models converted from and to transformers' Reformer compute the same function, and come back unchanged."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from torch import nn

from megabase.models import (
    ConfigError,
    LSHConfig,
    Reformer,
    ReformerClassifier,
)
from megabase.models.huggingface import from_huggingface, to_huggingface
from tests.models.huggingface.reference import (
    CAUSAL,
    CLASSIFIER,
    CONFIG,
    LOCAL,
    LSH,
    MASKED,
    MIXED,
    Doubles,
    close,
    converted_to_fp64,
    same_weights,
    tokens,
    transformers,
    transformers_model,
)
from tests.quick import slow


@pytest.mark.parametrize("kind", [CAUSAL, MASKED, CLASSIFIER])
@pytest.mark.parametrize("layers", [LOCAL, LSH, MIXED], ids="-".join)
@pytest.mark.parametrize("activation", ["relu", slow("gelu")])
def test_logits_are_the_same(kind, layers, activation, same_buckets):
    model = transformers_model(kind, layers, hidden_act=activation)
    same_buckets(model)
    x = tokens()
    expected = model(x).logits
    assert expected.std() > 0.01
    close(converted_to_fp64(model)(x), expected)
    logits = from_huggingface(model)(x)
    print(
        "standard deviation and largest difference:",
        expected.std().item(),
        (logits - expected).abs().max().item(),
    )
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("length", [1, 8, 50, 90])
@pytest.mark.parametrize("kind", [CAUSAL, MASKED])
def test_logits_are_the_same_at_lengths_that_transformers_pads(kind, length, same_buckets):
    model = transformers_model(kind, MIXED)
    same_buckets(model)
    x = tokens(length=length)
    expected = model(x).logits
    close(converted_to_fp64(model)(x), expected)


def test_local_layers_give_the_same_logits_in_fp32():
    model = transformers_model(CAUSAL, LOCAL, dtype=torch.float32)
    torch.testing.assert_close(from_huggingface(model)(tokens()), model(tokens()).logits, atol=1e-4, rtol=0)


def test_fp32_errors_come_from_transformers(same_buckets):
    """transformers scores a position against itself with -1e5, which leaves fp32 two digits of the weights of a
    position that attends to nothing else."""
    model = transformers_model(CAUSAL, MIXED, dtype=torch.float32)
    same_buckets(model)
    x = tokens()
    theirs, ours = model(x).logits, from_huggingface(model)(x)
    exact = converted_to_fp64(model.double())(x)
    errors = [(logits - exact).abs().max().item() for logits in (ours, theirs)]
    print("errors against fp64, megabase and transformers:", errors)
    assert errors[0] < errors[1] / 10


@pytest.mark.parametrize("kind", [CAUSAL, MASKED, CLASSIFIER])
@pytest.mark.parametrize("layers", [LOCAL, MIXED], ids="-".join)
def test_logits_are_the_same_with_padding_masks(kind, layers, same_buckets):
    """If the last chunk holds a real token; see megabase/models/huggingface/convert.py."""
    model = transformers_model(kind, layers)
    same_buckets(model)
    x = tokens(batch=3)
    mask = torch.arange(96) < torch.tensor([[96], [95], [89]])
    expected = model(x, attention_mask=mask).logits
    logits = converted_to_fp64(model)(x, mask=mask)
    if kind is not CLASSIFIER:
        logits, expected = logits[mask], expected[mask]
    close(logits, expected)


def test_a_causal_local_model_takes_any_padding():
    model = transformers_model(CAUSAL, LOCAL)
    x = tokens(batch=3)
    mask = torch.arange(96) < torch.tensor([[96], [40], [3]])
    close(converted_to_fp64(model)(x, mask=mask)[mask], model(x, attention_mask=mask).logits[mask])


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
    model = transformers_model(CAUSAL, MIXED, **changes)
    ours = converted_to_fp64(model)
    assert to_huggingface(ours).config.to_dict() == model.config.to_dict()
    same_buckets(model)
    expected = model(tokens()).logits
    close(ours(tokens()), expected)


@pytest.mark.parametrize("kind", [slow(CAUSAL), MASKED, CLASSIFIER])
def test_gradients_are_the_same(kind, same_buckets):
    model = transformers_model(kind, MIXED).train()
    same_buckets(model)
    ours = converted_to_fp64(model)
    x = tokens()
    y = model(x).logits
    grad = torch.randn_like(y)
    y.backward(grad)
    ours(x).backward(grad)
    # to_huggingface renames weights; put the gradients in their place.
    with torch.no_grad():
        for weight in ours.parameters():
            weight.copy_(weight.grad)
    named = dict(to_huggingface(ours).named_parameters())
    for name, weight in model.named_parameters():
        if name != "lm_head.bias":
            assert weight.grad.abs().max() > 0, name
            torch.testing.assert_close(named[name], weight.grad, atol=1e-8, rtol=1e-8)


def test_an_exported_model_is_the_same_function(same_buckets):
    ours = Reformer(dataclasses.replace(CONFIG, tie_embeddings=True)).double().eval()
    ours.body.stack.arithmetic = Doubles
    model = to_huggingface(ours)
    assert isinstance(model, CAUSAL)
    same_buckets(model)
    x = tokens(vocab=9, length=64)
    expected = model(x).logits
    close(ours(x), expected)


@pytest.mark.parametrize("kind", [CAUSAL, MASKED, CLASSIFIER])
@pytest.mark.parametrize("layers", [LOCAL, LSH, MIXED], ids="-".join)
@pytest.mark.parametrize("dtype", [torch.float32, slow(torch.bfloat16)])
def test_from_transformers_and_back_is_the_same_model(kind, layers, dtype):
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
    model = transformers_model(kind, layers, dtype=dtype, **changes)
    state = torch.get_rng_state()
    again = to_huggingface(from_huggingface(model))
    assert torch.equal(state, torch.get_rng_state())
    assert type(again) is type(model)
    assert same_weights(again, model)
    assert again.config.to_dict() == model.config.to_dict()
    assert again.training == model.training
    # Copies share no memory.
    assert not {w.data_ptr() for w in again.parameters()} & {w.data_ptr() for w in model.parameters()}


CONFIGS = [
    CONFIG,
    dataclasses.replace(CONFIG, causal=False, positions="learned", head_dim=5, head_bias=True),
    dataclasses.replace(CONFIG, tie_embeddings=True, layers=["local", "local"], max_length=60),
    dataclasses.replace(CONFIG, dropout=0.1, attention_dropout=0.2, axial_shape=[4, 20], axial_dims=[5, 11]),
    dataclasses.replace(CONFIG, lsh=LSHConfig(n_buckets=1024, attend="chunk", dropout=0.4)),
    dataclasses.replace(CONFIG, layers=["local"], conv=0, lsh=LSHConfig(duplicates="once")),
]


@pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))
@pytest.mark.parametrize("saved", [slow(False), True], ids=["in memory", "on disk"])
def test_to_transformers_and_back_is_the_same_model(config, saved, tmp_path):
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


def test_a_classifier_to_transformers_and_back_is_the_same_model():
    config = dataclasses.replace(CONFIG, causal=False, classifier="first")
    model = ReformerClassifier(config, classes=3)
    exported = to_huggingface(model)
    assert exported.config.num_labels == 3
    again = from_huggingface(exported)
    assert again.body.config == config
    assert same_weights(again, model)


@pytest.mark.slow
def test_megabase_can_be_imported_without_transformers():
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


def test_models_without_a_counterpart_are_refused_by_name():
    with pytest.raises(ConfigError, match="ReformerForQuestionAnswering"):
        from_huggingface(transformers_model(transformers.ReformerForQuestionAnswering, LOCAL))
    with pytest.raises(ConfigError, match="Linear"):
        to_huggingface(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match=r"model\.classifier=mean"):
        to_huggingface(ReformerClassifier(CONFIG, classes=2))
