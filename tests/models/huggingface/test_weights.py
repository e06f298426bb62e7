"""Weights from transformers' model and back: heads, files, and weights that are refused."""

import dataclasses

import pytest
import torch
from torch import nn

from megabase.models import (
    ConfigError,
    Reformer,
)
from megabase.models.huggingface import from_huggingface, to_huggingface
from tests.models.huggingface.reference import (
    CAUSAL,
    CONFIG,
    LOCAL,
    MIXED,
    same_weights,
    tokens,
    transformers_model,
)


def test_a_head_bias_is_kept_with_a_warning():
    """transformers 5 has the parameter but does not add it; megabase adds it and warns."""
    model = transformers_model(CAUSAL, LOCAL)
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


def test_a_tied_head_that_training_changed_is_no_longer_tied():
    tied = to_huggingface(Reformer(dataclasses.replace(CONFIG, tie_embeddings=True)))
    with torch.no_grad():
        tied.lm_head.decoder.weight[0, 0] += 1
    again = from_huggingface(tied)
    assert not again.body.config.tie_embeddings
    assert torch.equal(again.head.weight, tied.lm_head.decoder.weight)


def test_weights_that_a_reformer_does_not_have_are_refused():
    adapted = transformers_model(CAUSAL, LOCAL)
    adapted.adapter = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match=r"adapter\.bias"):
        from_huggingface(adapted)


def test_files_converted_there_and_back_are_the_same_bytes(tmp_path):
    transformers_model(CAUSAL, MIXED, dtype=torch.float32, pad_token_id=1).save_pretrained(tmp_path / "one")
    model = CAUSAL.from_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "two")
    to_huggingface(from_huggingface(model)).save_pretrained(tmp_path / "three")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "three" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
