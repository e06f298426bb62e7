"""FLOPs equal those that torch counts while the model runs."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megabase.models import (
    FeedForwardConfig,
    LinformerConfig,
    LocalConfig,
    LSHConfig,
    PerformerConfig,
    Reformer,
    ReformerConfig,
)
from megabase.models.flops import flops_per_token, keys_per_query, training_flops_per_token

LENGTH = 40
PERFORMER = ReformerConfig(
    vocab_size=9,
    dim=16,
    depth=3,
    heads=2,
    layers=["performer"],
    conv=0,
    positions="none",
    performer=PerformerConfig(features=12),
)
LINFORMER = dataclasses.replace(
    PERFORMER, layers=["linformer"], causal=False, max_length=LENGTH, linformer=LinformerConfig(size=6)
)


def count_flops(run: Callable[[], object]) -> int:
    # torch counts no fused attention on CPUs.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        run()
    return counter.get_total_flops()


def test_flops_equal_those_torch_counts():
    config = ReformerConfig(vocab_size=9, dim=32, depth=2, heads=2, layers=["full"], conv=0, causal=False)
    model = Reformer(config)
    x = torch.zeros(1, 64, dtype=torch.long)
    assert count_flops(lambda: model(x)) == 64 * flops_per_token(config, 64)
    for change in (
        {"tie_embeddings": True},
        {"head_dim": 8},
        {"feedforward": FeedForwardConfig(activation="swiglu")},
    ):
        other = dataclasses.replace(config, **change)
        changed = Reformer(other)
        assert count_flops(lambda model=changed: model(x)) == 64 * flops_per_token(other, 64)


def test_flops_of_attention_count_the_keys_attended_to():
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


@pytest.mark.parametrize(
    "config",
    [
        dataclasses.replace(PERFORMER, causal=False),
        LINFORMER,
        dataclasses.replace(LINFORMER, linformer=LinformerConfig(6, "keyvalue")),
        dataclasses.replace(LINFORMER, linformer=LinformerConfig(6, "none")),
    ],
    ids=["performer", "linformer", "linformer keyvalue", "linformer none"],
)
def test_flops_of_performer_and_linformer_equal_those_torch_counts(config):
    model = Reformer(config).eval()
    x = torch.zeros(1, LENGTH, dtype=torch.long)
    assert count_flops(lambda: model(x)) == LENGTH * flops_per_token(config, LENGTH)


def test_flops_of_performer_and_linformer_do_not_grow_with_length():
    assert keys_per_query(PERFORMER, "performer", 10**6) == 12
    assert keys_per_query(LINFORMER, "linformer", 10**6) == 6
    assert flops_per_token(PERFORMER, 10**6) == flops_per_token(PERFORMER, 10)
    causal, both = PERFORMER, dataclasses.replace(PERFORMER, causal=False)
    assert flops_per_token(causal, 10) == flops_per_token(both, 10)
