"""A small pretrained model, and labelled sequences."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from megabase.models import LSHConfig, Reformer, ReformerConfig

CONFIG = ReformerConfig(
    vocab_size=9, dim=16, depth=2, heads=2, max_length=256, lsh=LSHConfig(chunk_length=16), head_bias=True
)


def write_export(path: Path, config: ReformerConfig = CONFIG, length: int = 128) -> Reformer:
    """Write a model of random weights as `megabase export` does; returns it."""
    torch.manual_seed(0)
    model = Reformer(config, first_label=5).eval()
    path.mkdir(parents=True)
    save_file(
        {name: weight.contiguous() for name, weight in model.state_dict().items()}, path / "model.safetensors"
    )
    content = {"model": asdict(config), "alphabet": "dna", "step": 7, "settings": {"data.length": length}}
    (path / "config.json").write_text(json.dumps(content))
    return model


def random_rows(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Sequences rich in AT or in GC, and which they are."""
    random = np.random.default_rng(seed)
    odds = {"at": [0.4, 0.1, 0.1, 0.4], "gc": [0.1, 0.4, 0.4, 0.1]}
    rows = []
    for number in range(count):
        label = ("at", "gc")[number % 2]
        letters = random.choice(list("ACGT"), int(random.integers(20, 60)), p=odds[label])
        rows.append(("".join(letters), label))
    return rows


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of a small model."""
    path = tmp_path_factory.mktemp("finetune") / "model"
    write_export(path)
    return path


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A CSV of 60 rows."""
    path = tmp_path / "table.csv"
    path.write_text(
        "sequence,label\n" + "".join(f"{letters},{label}\n" for letters, label in random_rows(60))
    )
    return path
