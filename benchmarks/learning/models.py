"""The models that are compared: the same width, depth and feed-forward, other attention.

`ours` is the default of megabase. A name that ends in `-plain` has neither values that look ahead, nor the convolution
before queries and keys, nor their gain at the start.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from megabase.datamodules.alphabet import Alphabet
from megabase.models import LocalConfig, LSHConfig, PerformerConfig, ReformerConfig

PLAIN: dict[str, Any] = {"conv": 0, "query_gain": 1.0, "values_ahead": False}

MODELS: dict[str, dict[str, Any]] = {
    "ours": {},
    "paper": PLAIN | {"positions": "axial", "lsh.attend": "chunk", "local.attend": "chunk"},
    "local": {"layers": ["local"]},
    "full": {"layers": ["full"]},
    "performer": {"layers": ["performer"]},
    "local-plain": PLAIN | {"layers": ["local"]},
    "full-plain": PLAIN | {"layers": ["full"]},
    "performer-plain": PLAIN | {"layers": ["performer"]},
    "no-ahead": {"values_ahead": False, "lsh.n_buckets": 4},
    "no-conv": {"conv": 0},
    "no-gain": {"query_gain": 1.0},
    "no-bias": {"head_bias": False},
    "plain": PLAIN,
    "once": {"lsh.duplicates": "once"},
    "rounds-2": {"lsh.rounds": 2},
    "rounds-8": {"lsh.rounds": 8},
    "conv-4": {"conv": 4},
    "conv-8": {"conv": 8},
    "conv-16": {"conv": 16},
    "chunk-16": {"lsh.chunk_length": 16},
    "chunk-128": {"lsh.chunk_length": 128},
    "buckets-x1": {"lsh.n_buckets": 1},
    "buckets-x2": {"lsh.n_buckets": 2},
    "buckets-x8": {"lsh.n_buckets": 8},
}
"""What each model has that is not the default, by key of ReformerConfig. `lsh.n_buckets` is a multiple of length /
chunk_length here."""


@dataclass(frozen=True)
class Size:
    """The size of all models of a table.

    Attributes:
        dim, depth, heads: see ReformerConfig.
        chunk: `chunk_length` of lsh layers.
        window: of local layers.
        features: random features of a performer's head.
    """

    dim: int = 64
    depth: int = 4
    heads: int = 2
    chunk: int = 32
    window: int = 64
    features: int = 64
    vocab_size: int = field(default=Alphabet.named("dna").vocab_size)


def build(name: str, size: Size, length: int) -> ReformerConfig:
    """The settings of the model called `name` (a key of MODELS) for sequences of `length` tokens."""
    config = ReformerConfig(
        vocab_size=size.vocab_size,
        dim=size.dim,
        depth=size.depth,
        heads=size.heads,
        max_length=length,
        lsh=LSHConfig(chunk_length=size.chunk),
        local=LocalConfig(window=size.window),
        performer=PerformerConfig(features=size.features),
    )
    values = dataclasses.asdict(config)
    for key, value in MODELS[name].items():
        part, _, rest = key.rpartition(".")
        (values[part] if part else values)[rest] = value
    multiple = MODELS[name].get("lsh.n_buckets")
    if multiple is not None:
        values["lsh"]["n_buckets"] = multiple * length // values["lsh"]["chunk_length"]
    return ReformerConfig.from_dict(values)
